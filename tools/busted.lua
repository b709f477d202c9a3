-- Debian's busted runs under Lua 5.1 alone; this runs it under the interpreter at hand.
-- (pcall hides this file from busted, which would otherwise look for the specs in here.)
assert(pcall(require "busted.runner", { standalone = false, output = "tools/busted_output.lua" }))
