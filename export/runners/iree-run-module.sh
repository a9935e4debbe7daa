#!/bin/sh
# Runs a bundle with IREE's own `iree-run-module`, without Python: greedy continuation of a prompt of ids.
#
#   sh iree-run-module.sh BUNDLE TOKENS ID...        # sh iree-run-module.sh box.bundle 12 1 742 755 261 460
#
# `iree-run-module` is in every build of IREE's runtime (and in the wheel iree-base-runtime). Each call here is a process
# that reads the weights again, so this is slow: it serves to check a device, or as an example for calling from C.
# DEVICE=local-sync, vulkan, cuda, … chooses the device, TARGET=iree-vulkan, … the module of the bundle.
set -eu
bundle=$1 tokens=$2
shift 2
fail() { echo "$*" >&2; exit 1; }
for file in manifest.json weights.safetensors "targets/${TARGET:-iree-cpu}/model.vmfb"; do
  [ -f "$bundle/$file" ] && [ ! -L "$bundle/$file" ] || fail "$bundle/$file: expected a regular file"
done
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

# Runs a function by its name and its inputs in order. Prints the id with the largest logit; keeps the state in files.
step() {
  function=$1
  shift
  [ "$function" != decode ] || for i in $(seq "$states"); do set -- "$@" --input=@"$work/$i.npy"; done
  set -- "$@" --output=-
  for i in $(seq "$states"); do set -- "$@" --output=@"$work/$i.npy"; done
  iree-run-module --device="${DEVICE:-local-task}" --module="$bundle/targets/${TARGET:-iree-cpu}/model.vmfb" \
    --parameters=model="$bundle/weights.safetensors" --function="$function" "$@" \
    --output_max_element_count=1000000 >"$work/out"
  sed -n 's/^1x[0-9]*xf32=\[\(.*\)\]$/\1/p' "$work/out" | tr ' ' '\n' |
    awk '/n/ { bad = 1 } NR == 1 || $1 + 0 > most { most = $1 + 0; id = NR - 1 } END { if (NR && !bad) print id }' \
      >"$work/id" # a number with an n is nan or inf
  [ -s "$work/id" ] || fail "$function: logits that are not finite, or none"
  cat "$work/id"
}

# The manifest has the shapes of the state, which is zeros at first. The first bucket is the smallest prefill program.
manifest=$(head -c 16777216 "$bundle/manifest.json" | tr -d ' \n')
read_number() { echo "$manifest" | sed -n "s/.*$1\([0-9]\{1,9\}\)[],}].*/\1/p" | grep . || fail "manifest.json: no $2"; }
value='{"name":"\([^"]*\)","dtype":"\([a-z0-9]*\)","shape":\[\([0-9,]*\)\]},\{0,1\}'
# The values of a list, one per line: name dtype shape.
read_values() { echo "$manifest" | sed -n "s/.*$1\[\(\($value\)*\)\].*/\1/p" | sed "s/$value/\1 \2 \3;/g" | tr ';' '\n'; }
state=$(read_values '"cache":{[^{}]*"state":')
# Manifests of the first releases do not describe the state.
[ -n "$state" ] || state=$(read_values '"decode":{[^{}]*"inputs":' | grep '^\(key\|value\) ') ||
  fail "manifest.json: no state"
states=0 zeros=''
while read -r name dtype shape; do
  case $dtype in
    float32) kind=f32 ;; float16) kind=f16 ;; int32) kind=i32 ;; uint8) kind=i8 ;;
    *) fail "state $name in $dtype: expected float32, float16, int32 or uint8, which iree-run-module keeps in files" ;;
  esac
  states=$((states + 1)) zeros="$zeros --input=$(echo "$shape" | sed 's/,/x/g;s/.$/&x/')$kind=0"
done <<END
$state
END
bucket=$(read_number '"buckets":\[' buckets)
slots=$(read_number '"slots":' slots)
vocabulary=$(read_number '"vocab_size":' vocabulary)
length=$# padded=$*
[ "$length" -le "$bucket" ] || fail "$length ids: expected at most $bucket, the smallest bucket"
[ "$((length + tokens - 1))" -le "$slots" ] || fail "$length ids and $tokens tokens: expected at most $slots + 1 in all"
for id; do
  [ "$id" -ge 0 ] && [ "$id" -lt "$vocabulary" ] || fail "id $id: expected 0 to $((vocabulary - 1))"
done
# Without the instructions that the module needs, it would end without a message. Other systems do not list features.
needs=$(echo "$manifest" | sed -n "s/.*\"${TARGET:-iree-cpu}\":{[^{}]*\"processor\":{\"machine\":\"\([^\"]*\)\"[^{}]*\
\"features\":\[\([^]]*\)\].*/\1,\2/p" | tr -d '"')
here=$(uname -m | sed 's/^arm64$/aarch64/;s/^AMD64$/x86_64/')
has=$(sed -n '/^\(flags\|Features\)[[:space:]]*:/{s/.*://p;q;}' /proc/cpuinfo 2>/dev/null || true)
for need in $(echo "$needs" | tr , ' '); do
  case " $here ${has:-$need} " in
    *" $need "*) ;;
    *) fail "compiled for a processor with $need, which this one ($here) is not: export it for another target, or here" ;;
  esac
done
for _ in $(seq $((bucket - length))); do padded="$padded 0"; done

# shellcheck disable=SC2086  # the words contain no spaces
id=$(step "prefill_$bucket" --input="1x${bucket}xi32=$padded" --input="1xi32=$length" --input=1xi32=0 $zeros)
for _ in $(seq $((tokens - 1))); do
  printf '%s ' "$id"
  id=$(step decode --input="1xi32=$id" --input="1xi32=$length")
  length=$((length + 1))
done
echo "$id"
