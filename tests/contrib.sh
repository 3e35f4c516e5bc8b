#!/usr/bin/env bash
# Whether what is in contrib/ fits what mce-relay says: every metric in it is in docs/metrics.md, Prometheus takes the rules and
# each expression of the dashboard, and the rules' own tests pass. promtool is Debian's, of the package prometheus, which is
# unpacked below target/ and not installed; where it cannot be had that part is skipped, with a word.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
store=target/tools/prometheus
promtool=$(command -v promtool || echo $store/usr/bin/promtool)
if [ ! -x "$promtool" ]; then
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    if (cd "$tmp" && apt-get download -qq -o APT::Sandbox::User=root prometheus) >&2 && dpkg-deb -x "$tmp"/*.deb "$tmp/root"; then
        mkdir -p "$store/usr/bin"
        mv "$tmp/root/usr/bin/promtool" "$store/usr/bin/"
    fi
fi
expressions=target/tests/dashboard.rules.yml
mkdir -p target/tests
python3 - >"$expressions" <<'END'
import json, re, sys

known = set(re.findall(r"`(mce_relay_\w+)`", open("docs/metrics.md").read()))
rules = open("contrib/prometheus/mce-relay.rules.yml").read()
tests = open("contrib/prometheus/mce-relay.test.yml").read()
board = json.load(open("contrib/grafana/mce-relay.json"))
exprs = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
used = set()
for text in [rules, tests, *exprs]:
    used |= {re.sub(r"_bucket$", "", name) for name in re.findall(r"mce_relay_\w+", text)}
if used - known:
    sys.exit(f"contrib/ has metrics that docs/metrics.md has not: {', '.join(sorted(used - known))}")
alerts = re.findall(r"- alert: (\w+)", rules)
untested = [alert for alert in alerts if f"alertname: {alert}\n" not in tests]
if untested:
    sys.exit(f"contrib/prometheus/mce-relay.test.yml has no alert that fires for: {', '.join(untested)}")
places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
if len(set(places)) != len(places) or len({panel["id"] for panel in board["panels"]}) != len(places):
    sys.exit("two panels of contrib/grafana/mce-relay.json have one place or one number")
print("groups:\n  - name: dashboard\n    rules:")
for index, expr in enumerate(exprs):
    expr = expr.replace("$vm", ".*").replace("$__rate_interval", "5m")
    print(f"      - record: panel:{index}\n        expr: {json.dumps(expr)}")
END
if [ ! -x "$promtool" ]; then
    echo 'SKIPPED contrib/ by promtool: Debian'"'"'s package prometheus cannot be had (see above)' >&2
    exit 0
fi
"$promtool" check rules contrib/prometheus/mce-relay.rules.yml "$expressions"
(cd contrib/prometheus && "$(cd ../.. && realpath "$promtool")" test rules mce-relay.test.yml)
