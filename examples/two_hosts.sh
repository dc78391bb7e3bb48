#!/usr/bin/env bash
# Two hosts on one machine, by hand: network namespaces with a cable between them. Needs root and iproute2.
#
#   terminal 1:  sudo examples/two_hosts.sh make         the hosts
#                sudo examples/two_hosts.sh serve        router, API and a prefill worker on the first; wait for "ready"
#   terminal 2:  sudo examples/two_hosts.sh join d1      a decode worker on the second, in the foreground
#   terminal 3:  sudo examples/two_hosts.sh ask          a streamed answer
#                sudo examples/two_hosts.sh join d2      one more, while requests run
#                sudo examples/two_hosts.sh drain d1     and the first one leaves: terminal 2 ends with status 0
#                sudo examples/two_hosts.sh workers
#                sudo examples/two_hosts.sh remove       when all is stopped
#
# DIPTYCH is the command (default: .venv/bin/diptych of this checkout). Further words of `serve` and `join` go to it.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
diptych=${DIPTYCH:-$here/.venv/bin/diptych}
first=10.78.0.1 second=10.78.0.2 url=http://10.78.0.1:8000
key=/run/diptych-two-hosts.key

on() { ip netns exec "$@"; }
what=${1:-help}
shift || true

case $what in
make)
  ip netns add diptych-1
  ip netns add diptych-2
  ip link add cable netns diptych-1 type veth peer name cable netns diptych-2
  ip -n diptych-1 addr add $first/24 dev cable
  ip -n diptych-2 addr add $second/24 dev cable
  for host in diptych-1 diptych-2; do
    ip -n $host link set lo up
    ip -n $host link set cable up
  done
  (umask 077 && head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n' >$key)
  ;;
serve) on diptych-1 "$diptych" serve --prefill 1 --listen $first:7000 --host $first --key-file $key "$@" ;;
join)
  name=${1:?a name, like d1}
  shift
  on diptych-2 "$diptych" worker --join $first:7000 --role decode --name "$name" --key-file $key "$@"
  ;;
ask)
  on diptych-1 curl -sN $url/v1/chat/completions -H 'content-type: application/json' \
    -d '{"stream": true, "messages": [{"role": "user", "content": "Tell me a story about a fox."}]}'
  ;;
workers) on diptych-1 curl -s $url/workers && echo ;;
drain) on diptych-1 curl -s -X POST "$url/workers/${1:?a name}/drain" && echo ;;
remove)
  ip netns del diptych-1
  ip netns del diptych-2
  rm -f $key
  ;;
*) sed -n '2,13p' "$0" ;;
esac
