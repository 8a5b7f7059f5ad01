#!/usr/bin/env bash
# The API with curl: probes, models, a completion, a chat, a stream, structured output, an error.
# Usage: curl.sh [--base-url URL]
set -euo pipefail

url=http://127.0.0.1:8000/v1
if [[ ${1:-} == --base-url ]]; then
  url=$2
fi
server=${url%/v1}

post() {
  curl --silent --show-error --no-buffer "$url/$1" -H 'Content-Type: application/json' -d "$2"
  echo
}

echo "health: $(curl --silent --output /dev/null --write-out '%{http_code}' "$server/health")"
curl --silent --show-error --fail "$url/models"
echo
post completions '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'
post chat/completions '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "max_completion_tokens": 16,
  "temperature": 0
}'
post completions '{"prompt": "One, two,", "max_tokens": 4, "temperature": 0, "stream": true,
  "stream_options": {"include_usage": true}}'
post chat/completions '{
  "messages": [{"role": "user", "content": "Is Paris in Europe?"}],
  "structured_outputs": {"choice": ["yes", "no"]},
  "temperature": 0
}'
post completions '{"prompt": "x", "temperature": 3}'
