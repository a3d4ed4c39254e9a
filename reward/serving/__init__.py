"""The scorer over HTTP: the app, the batching of concurrent requests, and the client."""
