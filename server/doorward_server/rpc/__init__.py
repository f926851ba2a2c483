"""The gRPC surface: translates calls into the domain's words and back. No SQL, no network.

Only this package and `app` know gRPC and the generated stubs.
"""
