"""The gateway's launcher: sets envoy.yaml's ports and upstreams, runs Envoy, drains it on SIGTERM."""
