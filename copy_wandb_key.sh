#!/usr/bin/env bash
# Put the key of Weights & Biases (WANDB_API_KEY, else ~/.netrc) where jobs read it: .wandb_key, mode 0600,
# tracked by git never, copied with the code never, shown never.
set -eu
set +x
umask 077
cd "$(dirname "$0")"
python=.venv/bin/python  # of `make demo` and `make test`; else whichever Python is there
[ -x "$python" ] || python=$(command -v python || command -v python3)
exec "$python" -m dssk wandb_key
