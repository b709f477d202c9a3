-- pglocks.lead in the timers of nginx: of all workers one leads, through deaths and reloads.

local support = require "spec.support"
local server = require "spec.nginx.server"

if not server.available() then return end -- nginx_spec.lua says so

local observe, wait_until = support.observe, support.wait_until

local HTTP = [[
  init_worker_by_lua_block {
    ngx.timer.at(0, function()
      local ok, err, why = pcall(require "pglocks".lead, "x", {
        database = { conninfo = os.getenv "PGLOCKS_TEST_CONNINFO", application_name = "worker " .. ngx.worker.pid() },
        interval = 0.1,
        stop = ngx.worker.exiting,
        on_lost = function(term, e) ngx.log(ngx.NOTICE, "lost term ", term.number, " ", e.sqlstate) end,
      }, function(term)
        ngx.log(ngx.NOTICE, "term ", term.number)
        repeat until not term:sleep(60)
      end)
      ngx.log(ok and ngx.NOTICE or ngx.ERR, "the end: ", tostring(err), " ", tostring(why))
    end)
  }
]]

-- Of the worker that leads, and of its backend.
local function leader()
  local rows = observe [[SELECT a.application_name AS name, l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
    WHERE locktype = 'advisory' AND granted]]
  assert.is_true(#rows < 2)
  if rows[1] then return tonumber(rows[1].name:match "^worker (%d+)$"), rows[1].pid end
end

local function wait_until_another(than)
  return wait_until("another leader", function()
    local worker, backend = leader()
    return worker and worker ~= than and backend ~= than and worker
  end)
end

describe("a leader in nginx", function()
  local nginx
  before_each(function() nginx = server.start { http = HTTP, locations = {} } end)
  after_each(function()
    nginx:stop()
    support.finish()
  end)

  it("is another worker when its own was killed", function()
    local first = wait_until("a leader", leader)
    support.signal("KILL", first)
    wait_until_another(first)
  end)

  it("learns of its loss, and all stand again", function()
    wait_until("a leader", leader)
    local _, backend = leader()
    observe("SELECT pg_terminate_backend($1)", backend)
    wait_until_another(backend)
    wait_until("on_lost", function()
      return support.read(nginx.prefix .. "/error.log"):find("lost term 1 57P01", 1, true)
    end)
    assert.equal("", nginx:errors())
  end)

  it("is one of the new workers after a reload", function()
    local first = wait_until("a leader", leader)
    local old = nginx:workers()
    nginx:command "-s reload"
    assert.is_truthy(wait_until_another(first))
    wait_until("the old workers to end", function()
      for _, pid in ipairs(old) do
        if not support.has_ended(pid) then return false end
      end
      return true
    end)
    assert.equal("", nginx:errors())
  end)
end)
