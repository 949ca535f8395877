"""The HTTP resources: schema, route and serving apart. Never imports torch."""
