#!/usr/bin/env bash
# jax 0.10.2, several processes on CPUs: gloo gives the others whatever address the machine's own name resolves to, which
# on a plain Debian or Ubuntu is 127.0.1.1 (or 127.0.0.1). So two machines that joined jax.distributed by a good address
# fail at the first collective: each is told to connect to itself. GLOO_SOCKET_IFNAME, which torch reads, changes nothing:
# jax calls `make_gloo_tcp_collectives` without its arguments `hostname` and `interface`, and has no setting for them.
# Passing the address by which the machine is reached helps. Two network namespaces joined by a cable are the machines.
# Seen: plain and with GLOO_SOCKET_IFNAME "Gloo context initialization failed ... Connection refused, remote=[127.0.0.1]";
# with `hostname` the sum, 3.
# Needs root, iproute2, and a machine whose own name resolves to a loopback address.
set -euo pipefail
work=$(mktemp -d)
trap 'for box in gloo-a gloo-b; do ip netns del "$box" 2>/dev/null || true; done; rm -rf "$work"' EXIT
getent ahostsv4 "$(hostname)" | grep -q '^127\.'
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2'
export JAX_PLATFORMS=cpu

ip netns add gloo-a
ip netns add gloo-b
ip -n gloo-a link add name cable type veth peer name cable netns gloo-b
for box in a:1 b:2; do
  ip -n "gloo-${box%:*}" address add "10.66.0.${box#*:}/24" dev cable
  ip -n "gloo-${box%:*}" link set cable up
  ip -n "gloo-${box%:*}" link set lo up
done

cat >"$work/sum.py" <<'PY'
import functools, os, sys
import jax
from jax._src.lib import _jax
index, how = int(sys.argv[1]), sys.argv[2]
if how == "hostname":
    _jax.make_gloo_tcp_collectives = functools.partial(_jax.make_gloo_tcp_collectives, hostname=f"10.66.0.{index + 1}")
jax.distributed.initialize("10.66.0.1:7000", 2, index)
from jax.experimental import multihost_utils
try:
    print("sum", int(multihost_utils.process_allgather(jax.numpy.asarray([index + 1])).sum()), flush=True)
except Exception as error:
    print("failed:", str(error).splitlines()[0][:160], flush=True)
os._exit(0)
PY

for how in plain variable hostname; do
  if [ "$how" = variable ]; then export GLOO_SOCKET_IFNAME=cable; fi
  timeout 90 ip netns exec gloo-b "$work/venv/bin/python" "$work/sum.py" 1 "$how" >"$work/b" 2>/dev/null &
  timeout 90 ip netns exec gloo-a "$work/venv/bin/python" "$work/sum.py" 0 "$how" >"$work/a" 2>/dev/null || true
  if [ "$how" != hostname ]; then kill %% 2>/dev/null || true; fi # one side may wait for the other for long
  wait || true
  echo "$how: $(grep -hE '^(sum|failed)' "$work/a" "$work/b" | tr '\n' ' ')"
  if [ "$how" = hostname ]; then [ "$(grep -c 'sum 3' "$work/a")" = 1 ]; else ! grep -q 'sum 3' "$work/a"; fi
done
echo "as described"
