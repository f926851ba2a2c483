"""Measurements: what a call costs in Doorward beyond what gRPC itself costs. `make bench` runs them."""
