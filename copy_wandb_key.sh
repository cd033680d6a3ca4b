#!/usr/bin/env bash
# Put the key of Weights & Biases (WANDB_API_KEY, else ~/.netrc) where jobs read it: .wandb_key, mode 0600,
# tracked by git never, copied with the code never, shown never.
set -eu
set +x
umask 077
cd "$(dirname "$0")"
exec python -m dssk.wandb_key
