#!/usr/bin/env bash
# Asks `slmops serve` by curl: an answer, a stream, and what Ollama's clients would send.
#
#   slmops serve desk=outputs/demo/bundle/model        (in another terminal)
#   ./with_curl.sh desk "where is my parcel?"
set -euo pipefail
MODEL=${1:?the name of a model} MESSAGE=${2:?a message}
URL=${SLMOPS_URL:-http://127.0.0.1:8000}
KEY=(${SLMOPS_API_KEY:+-H "Authorization: Bearer $SLMOPS_API_KEY"})

body() { # a chat request as JSON; python3 does the quoting
  python3 -c 'import json, sys
model, message, more = sys.argv[1:]
print(json.dumps({"model": model, "messages": [{"role": "user", "content": message}], **json.loads(more)}))' "$MODEL" "$MESSAGE" "$1"
}
ask() { curl -sS --fail-with-body "${KEY[@]}" -H 'Content-Type: application/json' "$@"; }

ask "$URL/v1/chat/completions" -d "$(body '{"temperature": 0}')"
echo
ask -N "$URL/v1/chat/completions" -d "$(body '{"temperature": 0, "stream": true}')"
ask -N "$URL/api/chat" -d "$(body '{"options": {"temperature": 0}}')"
