#!/usr/bin/env bash
# Sets gpt2ds up and trains. No root, no compiler, no GPU needed; what is done already is skipped.
#   ./launch.sh                  install, prepare the embedded text, train a few minutes, name the training log
#   ./launch.sh train [OPTIONS]  install, then `deepspeed gpt2ds/cli.py train` with these options
#   ./launch.sh test [OPTIONS]   install what the tests need, then run them (options go to pytest)
#   ./launch.sh COMMAND ...      any other gpt2ds command: prepare, generate, evaluate, report, profiles
# GPT2DS_VENV names another place for the virtual environment than .venv; GPT2DS_RANKS another number of ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=${GPT2DS_VENV:-.venv}

fail() {
  echo "launch.sh: $*" >&2
  exit 2
}

find_python() {
  local python
  for python in python3.11 python3.12 python3.13 python3; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "needs Python 3.11 or newer with venv (on Debian and Ubuntu: apt install python3 python3-venv)."
}

# install EXTRA: the pinned packages, once for each content of the files that name them.
install() {
  local target=.${1:+[$1]} stamp=$venv/.installed${1:+-$1} wanted
  wanted=$(cat pyproject.toml constraints.txt | cksum)
  if [ ! -x "$venv/bin/python" ]; then
    echo "Making $venv"
    "$(find_python)" -m venv "$venv"
  fi
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  echo "Installing the pinned packages (minutes the first time)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$target" ||
    fail "the packages could not be installed; the message above says which one and why."
  echo "$wanted" >"$stamp"
}

gpus() {
  "$venv/bin/python" -c 'from gpt2ds.devices import this_machine; print(len(this_machine().gpus))'
}

# train OPTIONS: through the deepspeed launcher, a rank per GPU, or per core and at most two where there is none.
train() {
  local found ranks quiet=()
  found=$(gpus)
  if [ "$found" -gt 0 ]; then
    ranks=$found
  else
    ranks=$(nproc)
    ranks=$((ranks > 2 ? 2 : ranks))
    export DS_ACCELERATOR=cpu
  fi
  ranks=${GPT2DS_RANKS:-$ranks}
  "$venv/bin/deepspeed" -q --num_gpus "$ranks" --master_port "$(free_port)" gpt2ds/cli.py train "$@"
}

free_port() {
  "$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

demo() {
  "$venv/bin/gpt2ds" prepare
  if [ "$(gpus)" -gt 0 ]; then
    # The model and its micro-batch are chosen to fit the cards; little accumulation, so that there is something to see.
    train --ds ds_configs/zero2.json --hours 0.1 --accumulation 2 --run "launch-$(date +%Y%m%d-%H%M%S)"
  else
    train --ds ds_configs/zero2.json --hours 0.04 --accumulation 1 --run "launch-$(date +%Y%m%d-%H%M%S)"
  fi
}

command=${1:-demo}
[ $# -gt 0 ] && shift
case $command in
demo)
  install ""
  demo
  ;;
train)
  install ""
  train "$@"
  ;;
test)
  install test
  "$venv/bin/python" -m pytest "$@"
  ;;
*)
  install ""
  "$venv/bin/gpt2ds" "$command" "$@"
  ;;
esac
