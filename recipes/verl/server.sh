# What the two recipes with a reward server share. First, where it shall run (--host 0.0.0.0 wants MECHREWARD_TOKEN in the
# environment of both sides):
#
#   mechreward serve --model "$MODEL" --pack "$PACK" --verifier gsm8k --mode gated --port 8000
URL="${MECHREWARD_URL:-http://127.0.0.1:8000}"

# Don't train against a server that is not there.
python - "$URL" <<'PY'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/readyz", timeout=10)
PY

server=(
  # Our reward manager sends the server the very token ids that were sampled.
  reward.reward_manager.source=importlib
  reward.reward_manager.name=RewardManager
  reward.reward_manager.module.path=pkg://mechreward.integrations.verl

  # MECHREWARD_URL in the environment of all nodes does as well.
  +reward.reward_kwargs.url="$URL"

  # For how many seconds to ask for one reward, before the run ends.
  +reward.reward_kwargs.deadline=300
)
