-- pglocks.selftest inside nginx.

local pooler = require "spec.faults.pooler"
local server = require "spec.nginx.server"
local support = require "spec.support"

if not server.available() then return end -- nginx_spec.lua says so

local SAY = [[
  local ok, result = pcall(require "pglocks".selftest, { %s })
  ngx.say(ok and result.kind or result.code or "error", ": ", tostring(result))
]]

describe("the selftest inside nginx", function()
  local nginx

  after_each(function()
    if nginx then nginx:stop() end
    nginx = nil
    pooler.stop()
    support.finish()
  end)

  local function start(locations)
    nginx = server.start { locations = locations }
  end

  local function says(path, kind)
    local body = nginx:get(path)
    assert.equal(kind, body:match "^[^:]+", body)
    return body
  end

  it("tells a direct address, in a request and in a timer", function()
    local selftest = SAY:format(("conninfo = %q"):format(support.conninfo))
    start {
      ["/request"] = selftest,
      ["/timer"] = [[
        local semaphore = require "ngx.semaphore".new()
        local said
        ngx.timer.at(0, function()
          local ngx = { say = function(...) said = table.concat { ... } end }
          ]] .. selftest .. [[
          semaphore:post(1)
        end)
        semaphore:wait(5)
        ngx.say(said)
      ]],
    }
    says("/request", "direct")
    says("/timer", "direct")
    assert.equal("", nginx:errors())
  end)

  it("raises where nothing can wait", function()
    start { ["/log"] = { [[
      return 200 "done";
      log_by_lua_block {
        local ok, err = pcall(require "pglocks".selftest)
        ngx.log(ngx.ERR, "it said: ", tostring(ok), " ", tostring(err))
      }
    ]] } }
    nginx:get "/log"
    support.wait_until("what it logs", function()
      return nginx:errors():find("it said: false pglocks: nginx cannot wait in log_by_lua", 1, true)
    end)
  end)

  for mode, kind in pairs { session = "session pooling", transaction = "transaction pooling",
    statement = "statement pooling" } do
    it(("tells a pooler by %s"):format(mode), function()
      if pooler.missing then pending(pooler.missing) end
      pooler.start()
      start { ["/pooler"] = SAY:format(("conninfo = %q"):format(pooler.conninfo(mode))) }
      for _ = 1, 3 do says("/pooler", kind) end
    end)
  end

  it("leaves nothing while its request goes on, when it fails in the middle", function()
    if pooler.missing then pending(pooler.missing) end
    pooler.start { small = "pool_mode=transaction pool_size=1" }
    start { ["/small"] = SAY:format(("conninfo = %q, reply_timeout = 0.3"):format(pooler.conninfo "small"))
      .. "ngx.flush(true) ngx.sleep(30)" }
    local request = nginx:begin "/small"
    assert.equal("too_many_connections", request.line():match "^[^:]+")
    assert.same({}, support.pg_locks())
    support.signal("TERM", request.pid)
    request.body()
  end)
end)
