-- How pglocks finds its server inside nginx, and trusts it: names, addresses, passwords, TLS.

local support = require "spec.support"
local server = require "spec.nginx.server"

local shell, wait_until = support.shell, support.wait_until

if not server.available() then return end -- nginx_spec.lua says so

-- Answers every question about *.example with 127.0.0.1, but that for nowhere.example.
local NAME_SERVER = [[
  local uv = require "luv"
  local socket = uv.new_udp()
  socket:bind("127.0.0.1", 0)
  print(socket:getsockname().port)
  io.stdout:flush()
  socket:recv_start(function(_, question, from)
    if not question then return end
    local reply = "\129\128\0\1\0\1\0\0\0\0" .. question:sub(13) .. "\192\12\0\1\0\1\0\0\0\60\0\4\127\0\0\1"
    if question:find("nowhere", 1, true) then reply = "\129\131\0\1\0\0\0\0\0\0" .. question:sub(13) end
    socket:send(question:sub(1, 2) .. reply, from.ip, from.port)
  end)
  uv.run()
]]

local CONNECT = [[
  local ok, result = pcall(function()
    local conn = require "pglocks".connect { %s }
    conn:lock "connected":release()
    local session = conn:query("SELECT current_user AS u, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")[1]
    conn:close()
    return session.u .. " " .. tostring(session.version)
  end)
  ngx.say(tostring(result))
]]

describe("a connection inside nginx", function()
  local data = os.getenv "PGLOCKS_TEST_DATA"
  local port = support.core.conninfo(support.conninfo).port
  local nginx, names, password_file

  setup(function()
    if not data then return end
    local certificate = support.with_tls()
    names = support.spawn(NAME_SERVER)
    password_file = os.tmpname()
    local file = io.open(password_file, "w")
    file:write(("127.0.0.1:1:*:*:canary\n127.0.0.1:%s:postgres:scram_user:secret of scram\n"):format(port))
    file:close()
    shell("chmod 600 " .. password_file)

    local all = {}
    local function add(path, ...)
      all[path] = CONNECT:format(table.concat({
        'dbname = "postgres", user = "scram_user", port = ' .. port, ...,
      }, ", "))
    end
    local verified = ('password = "secret of scram", sslmode = "verify-full", sslrootcert = %q'):format(certificate)
    add("/password", 'host = "127.0.0.1", sslmode = "disable", password = "secret of scram"')
    add("/wrong", 'host = "127.0.0.1", password = "canary"')
    add("/passfile", ('host = "127.0.0.1", passfile = %q'):format(password_file))
    add("/verified", 'host = "db.example"', verified, 'channel_binding = "require"')
    add("/hostaddr", 'host = "db.example", hostaddr = "127.0.0.1"', verified)
    add("/unknown-name", 'host = "other.example"', verified)
    add("/no-name", 'host = "nowhere.example"')
    add("/several", 'host = "nowhere.example,/nonexistent,127.0.0.1"', 'password = "secret of scram"')
    add("/no-tls", 'host = "127.0.0.1", password = "secret of scram", sslmode = "disable"',
      'channel_binding = "require"')
    all["/nowhere"] = CONNECT:format 'host = "/nonexistent", port = 5432, timeout = 0.2'
    all["/refused"] = CONNECT:format 'host = "127.0.0.1", port = 1, timeout = 0.2'
    all["/pairs"] = [[
      local pglocks = require "pglocks"
      for i = 1, 100 do pglocks.with_lock("pair " .. i % 7, function(lock) assert(lock:held()) end) end
      ngx.say "done"
    ]]
    nginx = server.start {
      http = ('resolver 127.0.0.1:%s ipv6=off;\ninit_by_lua_block { require "pglocks".setup { databases = { '
        .. 'default = { host = "db.example", port = %s, dbname = "postgres", user = "scram_user", %s } } } }')
        :format(names.lines(), port, verified),
      locations = all,
    }
  end)

  teardown(function()
    if not data then return end
    if nginx then nginx:stop() end
    support.signal("TERM", names.pid)
    names.close()
    os.remove(password_file)
    support.without_tls()
    support.finish()
  end)

  local function test(title, fn)
    it(title, function()
      if not data then pending "this server is not ours to give a certificate" end
      fn()
    end)
  end

  local function assert_said(path, pattern)
    local said = nginx:get(path)
    assert.is_truthy(said:find(pattern), said)
    return said
  end

  test("takes a password from the description or a password file, and tells none", function()
    assert.equal("scram_user nil\n", (nginx:get "/password"))
    assert_said("/passfile", "^scram_user TLS")
    local said = assert_said("/wrong", '^pglocks: connect: connection to server at "127.0.0.1", port %d+ failed: '
      .. ".*password authentication failed")
    assert.is_nil(said:find "canary")
  end)

  test("verifies the server's name, and binds the password to the channel", function()
    assert_said("/verified", "^scram_user TLSv1.3\n$")
    assert_said("/hostaddr", "^scram_user TLSv1.3\n$")
    assert_said("/unknown-name", 'server certificate for "db.example" does not match host name "other.example"')
    assert_said("/no-tls", "channel binding required")
  end)

  test("is used again through TLS, and its locks released", function()
    for _ = 1, 5 do assert.equal("done\n", (nginx:get "/pairs")) end
    wait_until("all to be free", function() return #support.pg_locks() == 0 end)
  end)

  test("says why there is none", function()
    assert_said("/nowhere", 'connection to server on socket "/nonexistent/.s.PGSQL.5432" failed: no such file')
    assert_said("/refused", 'connection to server at "127.0.0.1", port 1 failed: connection refused')
    assert_said("/no-name", 'connection to server at "nowhere.example", port %d+ failed: .*Host not found')
  end)

  test("goes on to the next of several hosts", function()
    assert_said("/several", "^scram_user TLS")
  end)
end)
