#!/bin/sh
# What git runs for a push as pre-receive, update and post-receive: the repository's own hooks of that name,
# custom_hooks/<name> and then custom_hooks/<name>.d/* in order. The first that fails refuses the change. Git starts
# this in the repository's directory; the changes on standard input are repeated for each hook.
name=${0##*/}
changes=
[ "$name" = update ] || changes=$(cat)
for hook in "custom_hooks/$name" "custom_hooks/$name.d"/*; do
    case $hook in *~) continue ;; esac
    [ -f "$hook" ] && [ -x "$hook" ] || continue
    if [ "$name" = update ]; then
        "$PWD/$hook" "$@" </dev/null || exit
    else
        printf '%s\n' "$changes" 2>/dev/null | "$PWD/$hook" || exit
    fi
done
