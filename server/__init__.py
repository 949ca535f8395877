"""The server: decoder, generation engine, HTTP API and job service behind the command `awq-serve`."""
