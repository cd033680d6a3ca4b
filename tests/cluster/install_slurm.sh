#!/usr/bin/env bash
# Install what `pytest -m slurm` needs on Debian or Ubuntu: Slurm's daemons and commands, munge, and a database for
# accounting. The tests bring up a cluster of two nodes on the loopback interface by themselves and take it down again.
set -eu
export DEBIAN_FRONTEND=noninteractive
as_root=$([ "$(id -u)" = 0 ] || echo sudo)
$as_root apt-get update -qq
$as_root apt-get install -y --no-install-recommends slurm-wlm slurmdbd munge mariadb-server
echo "now: pytest -m slurm tests/cluster"
