#!/usr/bin/env bash
# Runs every example against a server, each client in a virtual environment of its own.
# Usage: check.sh URL [FOLDER]; the environments are made in FOLDER, or in a temporary one.
set -euo pipefail

url=${1:?usage: check.sh URL [FOLDER], such as check.sh http://127.0.0.1:8000}
url=${url%/}
url=${url%/v1}
here=$(cd "$(dirname "$0")" && pwd)
folder=${2:-}
if [[ -z $folder ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi

# run ENVIRONMENT REQUIREMENT EXAMPLE...
run() {
  local environment=$folder/$1 requirement=$2
  shift 2
  if [[ ! -x $environment/bin/pip ]]; then
    "${PYTHON:-python3}" -m venv "$environment"
  fi
  "$environment/bin/pip" install --quiet --disable-pip-version-check "$requirement"
  local example
  for example in "$@"; do
    echo "== $example with $requirement"
    "$environment/bin/python" "$here/$example" --base-url "$url/v1"
  done
}

openai_examples=(openai_chat.py openai_async.py openai_tools.py openai_structured.py)
run openai2 'openai>=2,<3' "${openai_examples[@]}"
run openai3 'openai>=3,<4' "${openai_examples[@]}"
run langchain langchain-openai langchain_chat.py
run litellm litellm litellm_chat.py
run nsa-client "$here/../clients" nsa_client_chat.py
echo "== curl.sh"
"$here/curl.sh" --base-url "$url/v1"
echo "all examples ran"
