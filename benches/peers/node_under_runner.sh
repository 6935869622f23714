#!/bin/sh
# What node-llama-cpp starts for its own checks, so that they run where the peer itself runs.
exec "$DEMASK_PEERS_RUNNER" node "$@"
