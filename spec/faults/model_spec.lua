-- The model of spec/faults/model.lua allows what advisory locks allow, and nothing else.

local model = require "spec.faults.model"

local function history(...)
  local lines = {}
  for _, text in ipairs { ... } do lines[#lines + 1] = text .. "\n" end
  return table.concat(lines)
end

local function check(text)
  local events = {}
  local ok, why = model.parse(text, events)
  if not ok then return nil, why end
  return model.check(events)
end

-- Three sessions; what they do is between.
local function between(...)
  return "1 a open 1\n1 b open 2\n1 c open 3\n" .. history(...)
    .. "90 a seen nothing | nothing\n90 a close\n90 b seen nothing | nothing\n90 b close\n"
    .. "90 c seen nothing | nothing\n90 c close\n"
end

local function without(text, line)
  local from, to = text:find(line .. "\n", 1, true)
  return text:sub(1, from - 1) .. text:sub(to + 1)
end

describe("the model of advisory locks", function()
  local function allows(text)
    local counts, why = check(text)
    assert.is_nil(why)
    return counts
  end

  it("allows what such locks allow", function()
    assert.equal(0, allows("").readers_at_most)
    local counts = allows(between(
      "2 a invoke 1 x exclusive", "3 a grant 1 x exclusive", "3 b invoke 1 x shared",
      "4 c invoke 1 x shared", "5 a read 1 x 0 nobody", "6 a confirm 1 x exclusive",
      "7 a release 1 x exclusive", "8 b grant 1 x shared", "8 a free 1 x exclusive", "9 c grant 1 x shared",
      "10 b seen shared x | shared x", "11 b release 1 x shared", "12 c release 1 x shared",
      "13 a invoke 2 x exclusive", "14 a fail 2 x exclusive timeout", "15 a seen nothing | nothing",
      "91 - counter x 1 a#1"))
    assert.equal(2, counts.readers_at_most)
    assert.equal(1, counts.timeout)
    assert.equal(1, counts.counted)
  end)

  it("allows two owners on two keys, and one owner twice on one", function()
    allows(between(
      "2 a invoke 1 x exclusive", "3 a grant 1 x exclusive", "4 b invoke 1 y exclusive",
      "5 b grant 1 y exclusive", "6 a invoke 2 x shared", "7 a grant 2 x shared",
      "8 a seen exclusive x, shared x | exclusive x, shared x", "9 a release 2 x shared",
      "10 a release 1 x exclusive", "11 b release 1 y exclusive"))
  end)

  -- b has the lock since 6; a was terminated at 4, and is inside, unaware, until 9.
  local unaware = between(
    "2 a invoke 1 x exclusive", "3 a grant 1 x exclusive", "4 - strike a terminate",
    "4.5 a read 1 x 0 nobody", "5 b invoke 1 x exclusive", "6 b grant 1 x exclusive", "6.5 b met 1 x a#1",
    "7 b read 1 x 0 nobody", "8 b confirm 1 x exclusive", "8.5 b release 1 x exclusive", "9 a lost",
    "10 - counter x 1 a#1")
  unaware = without(without(unaware, "90 a seen nothing | nothing"), "90 a close")

  it("allows one that was terminated to be inside, unaware, and to spoil the counter", function()
    assert.equal(1, allows(unaware).lost)
  end)

  it("allows one that was killed to end anywhere, in the middle of a line, too", function()
    local events = {}
    local text = history("1 p.1.1 open 1", "2 p.1.1 invoke 1 x exclusive", "3 p.1.1 grant 1 x exclusive",
      "4 - strike p.1 kill")
    assert.is_true(model.parse(text .. "4 p.1.1 rel", events, true))
    assert.equal(1, model.check(events).cut_short)
  end)

  local one = { "2 a invoke 1 x exclusive", "3 a grant 1 x exclusive" }
  local function after_one(...) return between(one[1], one[2], ...) end

  local killed_server = history("1 a open 1", "2 - strike * crash", "3 b open 2", "4 - recovered",
    "5 c open 3", "6 a lost", "7 b lost")

  it("allows sessions to be lost with the server", function()
    assert.equal(2, allows(killed_server .. "8 c seen nothing | nothing\n9 c close\n").lost)
  end)

  -- Two owners on the session 7, and one on the session 8, of the process p.1.
  local function of_many(...)
    return history("1 p.1.1 open 0", "2 pid7.p.1.1.x1 open 7", "2 pid7.p.1.1.x2 open 7", "2 pid8.p.1.1.x3 open 8",
      "3 pid7.p.1.1.x1 invoke 1 x exclusive", "4 pid7.p.1.1.x1 grant 1 x exclusive",
      "4 pid7.p.1.1.x2 invoke 1 x exclusive", "4 pid8.p.1.1.x3 invoke 1 x exclusive", ...)
  end

  local end_of_many = history("9 pid8.p.1.1.x3 close", "9 p.1.1 invoke 1 y shared", "9.1 p.1.1 fail 1 y shared lost",
    "9.2 p.1.1 seen nothing | nothing", "9.3 p.1.1 close")

  it("allows owners of one session to be lost with it, and no others", function()
    local counts = allows(of_many("5 - strike pid7 terminate", "6 pid8.p.1.1.x3 grant 1 x exclusive",
      "7 pid7.p.1.1.x1 lost", "7 pid7.p.1.1.x2 lost", "8 pid8.p.1.1.x3 release 1 x exclusive") .. end_of_many)
    assert.equal(3, counts.lost) -- two owners, and the call
    assert.equal(4, allows(of_many "5 - strike p.1 kill").cut_short)
  end)

  -- What is wrong, and what the model says of it.
  for case, wrong in pairs {
    ["two writers at a time: both are inside"] = after_one(
      "4 b invoke 1 x exclusive", "5 b grant 1 x exclusive", "6 b release 1 x exclusive",
      "7 a release 1 x exclusive"),
    ["a reader beside a writer: both are inside"] = after_one(
      "4 b invoke 1 x shared", "5 b grant 1 x shared", "6 b release 1 x shared", "7 a release 1 x exclusive"),
    ["a writer beside the last of two readers: both are inside"] = between(
      "2 a invoke 1 x shared", "3 a grant 1 x shared", "3 b invoke 1 x shared", "4 b grant 1 x shared",
      "5 a release 1 x shared", "6 c invoke 1 x exclusive", "7 c grant 1 x exclusive",
      "8 b release 1 x shared", "9 c release 1 x exclusive"),
    ["two writers when the first is struck later: both are inside"] = unaware:gsub("4 %- strike", "6.1 - strike"),
    ["two writers when the first was confirmed after the strike: both are inside"] =
      unaware:gsub("9 a lost", "6.1 a confirm 1 x exclusive\n9 a lost"),
    ["two that met, however the clocks were: they met"] = after_one(
      "4 a met 1 x b#1", "5 a confirm 1 x exclusive", "6 a release 1 x exclusive",
      "12 b invoke 1 x exclusive", "13 b grant 1 x exclusive", "14 b confirm 1 x exclusive",
      "15 b release 1 x exclusive"),
    ["a lost increment, however the clocks were: incremented the same count"] = after_one(
      "4 a read 1 x 0 nobody", "6 a release 1 x exclusive", "7 a free 1 x exclusive",
      "12 b invoke 1 x exclusive", "13 b grant 1 x exclusive", "14 b read 1 x 0 nobody",
      "15 b confirm 1 x exclusive", "16 b release 1 x exclusive"),
    ["a counter that counts wrong: the work of 1 increments"] = after_one(
      "4 a read 1 x 0 nobody", "5 a release 1 x exclusive", "95 - counter x 2 a#1"),
    ["a lock that is held after an error: disagree"] = between(
      one[1], "3 a fail 1 x exclusive timeout", "4 a seen nothing | exclusive x"),
    ["a lock that both sides say is held after an error: it holds nothing"] = between(
      one[1], "3 a fail 1 x exclusive timeout", "4 a seen exclusive x | exclusive x"),
    ["a release after an error: it is not held"] = between(
      one[1], "3 a fail 1 x exclusive timeout", "4 a release 1 x exclusive"),
    ["a grant that is none: disagree"] = after_one("4 a seen exclusive x | nothing", "5 a release 1 x exclusive"),
    ["a grant in another mode: disagree"] = after_one("4 a seen exclusive x | shared x", "5 a release 1 x exclusive"),
    ["a grant that nobody asked for: no such section"] = between(
      "3 a grant 1 x exclusive", "4 a release 1 x exclusive"),
    ["a lock that is held after its release: disagree"] = after_one(
      "4 a release 1 x exclusive", "5 a free 1 x exclusive", "6 a seen nothing | exclusive x"),
    ["a release in another mode: in another mode"] = after_one("4 a release 1 x shared"),
    ["two releases: it is not held"] = after_one("4 a release 1 x exclusive", "5 a release 1 x exclusive"),
    ["an end without a release: holds exclusive x"] = after_one(),
    ["an unknown outcome: no such outcome"] = between(one[1], "3 a fail 1 x exclusive unknown"),
    ["an error: an error"] = between "3 a error anything at all",
    ["a loss that nobody caused: nobody struck it"] = after_one("4 a lost"),
    ["Ctrl-C that nobody pressed: nobody interrupted it"] = between("3 - strike a terminate", "4 a interrupted"),
    ["a loss before the strike: nobody struck it"] = after_one("4 a lost", "5 - strike a terminate"),
    ["a loss after the server was there again: nobody struck it"] = killed_server .. "8 c lost\n",
    ["a session that goes on after its loss: it has ended"] =
      unaware:gsub("9 a lost", "5 a lost\n9 a invoke 2 x shared"),
    ["a session that is not asked for what it left: was not asked"] = without(between(), "90 a seen nothing | nothing"),
    ["two owners on one session to be alone: both are inside"] = of_many("5 pid7.p.1.1.x2 grant 1 x exclusive"),
    ["an owner to be lost with another session: nobody struck it"] =
      of_many("5 - strike pid8 terminate", "6 pid7.p.1.1.x1 lost"),
    ["a call to be lost, and no session: nobody struck"] =
      history("1 p.1.1 open 0", "2 p.1.1 invoke 1 y shared", "3 p.1.1 fail 1 y shared lost"),
    ["a session that does not end: did not end"] = without(between(), "90 a close"),
    ["a line that was torn: not a line"] = between("3 a invo", "ke 1 x exclusive"),
  } do
    local what, says = case:match "^(.*): (.*)$"
    it("does not allow " .. what, function()
      local counts, why = check(wrong)
      assert.is_nil(counts)
      assert.truthy(why:find(says, 1, true), why)
    end)
  end
end)
