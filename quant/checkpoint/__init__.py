"""The owners of what is on disk: metadata, codecs, reader and writer. Light to import; import the modules by name."""
