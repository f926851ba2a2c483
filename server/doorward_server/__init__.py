"""The Doorward server: the domain, its storage, and the gRPC services in front of it."""
