"""The scorer over HTTP: the app, what batches concurrent requests, and the client."""
