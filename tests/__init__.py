"""The tests, and the stand-ins for the outside world that also serve `make up`."""
