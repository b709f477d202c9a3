-- One line per test, failures in full where they happen. Each result is also written at once to
-- the file PGLOCKS_TEST_RESULTS, so that a crash of the interpreter loses none.
return function()
  local busted = require "busted"
  local handler = require "busted.outputHandlers.base" ()
  local results = os.getenv "PGLOCKS_TEST_RESULTS"

  -- Opened and closed each time: programs that the specs start must not inherit it.
  local function record(result, name)
    if results then
      local file = assert(io.open(results, "a"))
      file:write(result, "\t", (name:gsub("%s+", " ")), "\n")
      file:close()
    end
  end

  local function say(...)
    io.write(...)
    io.write "\n"
    io.flush()
  end

  local function indented(text)
    return "      " .. tostring(text):gsub("^%s+", ""):gsub("%s+$", ""):gsub("\n", "\n      ")
  end

  local function explain(message, trace)
    say(indented(message))
    if trace and trace.traceback and trace.traceback:find "%S" then say(indented(trace.traceback)) end
  end

  local word = { success = "ok  ", pending = "SKIP", failure = "FAIL", error = "FAIL" }
  local result = { success = "passed", pending = "skipped", failure = "failed", error = "failed" }
  local failures, reason = {}, nil

  function handler.fileStart(file)
    say(file.name)
    return nil, true
  end

  function handler.testStart(element)
    failures, reason = {}, nil
    record("started", handler.getFullName(element))
    return nil, true
  end

  function handler.testPending(_, _, message)
    reason = message
    return nil, true
  end

  function handler.testFailure(_, _, message, trace)
    failures[#failures + 1] = { message, trace }
    return nil, true
  end

  function handler.testEnd(element, _, status)
    local name = handler.getFullName(element)
    if status == "pending" and reason then name = name .. ": " .. tostring(reason) end
    say(("  %s %6.2fs  %s"):format(word[status], element.duration or 0, name))
    for _, failure in ipairs(failures) do explain(failure[1], failure[2]) end
    record(result[status], name)
    return nil, true
  end

  -- A spec that does not load, and anything around a test (before_each, teardown): a failure each.
  function handler.elsewhere(element, _, message, trace)
    if element.descriptor ~= "it" then
      local name = element.descriptor and handler.getFullName(element) or "busted"
      say("  FAIL          ", name)
      explain(message, trace)
      record("failed", name)
    end
    return nil, true
  end

  function handler.suiteEnd()
    record("ended", "")
    return nil, true
  end

  busted.subscribe({ "file", "start" }, handler.fileStart)
  busted.subscribe({ "test", "start" }, handler.testStart)
  busted.subscribe({ "pending" }, handler.testPending)
  busted.subscribe({ "failure", "it" }, handler.testFailure)
  busted.subscribe({ "error", "it" }, handler.testFailure)
  busted.subscribe({ "test", "end" }, handler.testEnd)
  busted.subscribe({ "error" }, handler.elsewhere)
  busted.subscribe({ "suite", "end" }, handler.suiteEnd)

  return handler
end
