# What a tier's output says, as lines of fields between tabs:
#   passed N | skipped N | failed KEY NAME | skip NAME REASON | death WHY | again WHY
# KEY is what has to be run to run a test again: a test binary, or one and the name of its test.
#
# Beside the closing lines of the runners it reads those of tests/run.sh: `planned: KEY` for what is to be
# run, `binary: KEY` before it is. What was planned and gave no result has failed.
# What was counted before the lab had to be started over does not count: all of it is run again.

BEGIN { OFS = "\t" }

function settle(i) { # what is known so far stays
    passed += p; skipped += s; p = s = 0
    for (i = 0; i < f; i++) print "failed", failure[i]
    f = 0
    for (i in done) delete planned[i]
    split("", done)
}
function forget() { p = s = f = 0; split("", done) }

/^lab: starting \(log: / && !over { settle() }
/^lab: .*(starting the lab over|the lab's own kernel died [0-9]+ times)/ {
    why = $0; sub(/^lab: (error: )?/, "", why); print "death", why
}
/^lab: .*starting the lab over/ { forget(); over = 1 }
/BOOTED AGAIN: / { why = $0; sub(/.*BOOTED AGAIN: /, "", why); print "again", why }

/^planned: / { key = $0; sub(/^planned: /, "", key); planned[key] = 1; key = "" }
/^binary: / { key = $0; sub(/^binary: /, "", key); names = 0 }

/^SKIPPED / {
    why = $0; sub(/^SKIPPED /, "", why); name = why
    sub(/: .*/, "", name); sub(/^[^:]*(::[^:]+)*: /, "", why)
    reason[name] = why
}
/^test .* \.\.\. ignored/ && !($2 in reason) {
    why = $0; sub(/.* \.\.\. ignored(, )?/, "", why)
    reason[$2] = why == "" ? "is not to be run by default" : why
}

# The last list of them before the closing line has the names alone.
/^failures:$/ { names = 0; listing = 1; next }
listing && /^    [^ ]+/ { listed[names++] = $1 }
/^test result: / {
    over = listing = 0; bad = 0
    for (i = 2; i <= NF; i++) {
        if ($i ~ /^passed/) p += $(i - 1)
        if ($i ~ /^failed/) bad = $(i - 1)
        if ($i ~ /^ignored/) s += $(i - 1)
    }
    for (i = 0; i < bad; i++) failure[f++] = key OFS (i < names ? listed[i] : "")
    if (key != "") done[key] = 1
    names = 0
}

END {
    settle()
    for (i in planned) print "failed", i, "gave no result"
    for (name in reason) print "skip", name, reason[name]
    print "passed", passed + 0
    print "skipped", skipped + 0
}
