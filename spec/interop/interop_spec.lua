-- The same locks as programs in other languages take: these themselves, and their digests.

local pglocks = require "pglocks"
local peer = require "spec.interop.peer"
local support = require "spec.support"

-- The python that Debian's packages are for may not be the first one.
local function find_python(modules)
  for _, python in ipairs { "python3", "/usr/bin/python3" } do
    local said = support.shell(python .. " -c 'import " .. modules .. "' && echo found")
    if said == "found\n" then return python end
  end
end

local python = find_python "hashlib"
local django = find_python "django_pglocks, psycopg2"
local has_ruby = support.shell "ruby -e 'require \"pg\"' && echo found" == "found\n"

local function it_with(what, name, fn)
  it(name, what and fn or function() pending "its language is not installed" end)
end

local peers = {
  {
    what = "django-pglocks 1.0.4 itself",
    there = django,
    command = "exec " .. (django or "python3") .. " spec/interop/peer.py",
    options = { hash = "django-pglocks" },
    keys = { ['"some lock"'] = "some lock", ['"invoice 42"'] = "invoice 42", ['"naïve-日本"'] = "naïve-日本",
      ['""'] = "", ["42"] = 42, ["-7"] = -7, ["[7, 42]"] = { 7, 42 }, ["[-1, -2]"] = { -1, -2 } },
  },
  {
    what = "with_advisory_lock's calls on ruby-pg",
    there = has_ruby,
    command = "exec ruby spec/interop/peer.rb",
    options = { hash = "with_advisory_lock" },
    keys = { ['"some lock"'] = "some lock", ['"invoice 42"'] = "invoice 42", ['"naïve-日本"'] = "naïve-日本" },
  },
  {
    what = "with_advisory_lock's calls on ruby-pg with a prefix",
    there = has_ruby,
    command = "WITH_ADVISORY_LOCK_PREFIX=-7 exec ruby spec/interop/peer.rb",
    options = { hash = "with_advisory_lock", namespace = "-7" },
    keys = { ['"some lock"'] = "some lock" },
  },
}

for _, case in ipairs(peers) do
  describe(case.what, function()
    after_each(function()
      peer.finish()
      support.finish()
    end)

    for theirs, ours in pairs(case.keys) do
      local key = type(ours) == "string" and pglocks.key(ours, case.options) or pglocks.key(ours)

      it_with(case.there, "excludes us and is excluded: " .. theirs, function()
        local other, conn = peer.start(case.command), support.connect()
        local pid = tonumber(other:ask "pid")

        assert.equal("True", other:ask("take", theirs))
        assert.same({ nil, "busy" }, { conn:try_lock(key) })
        assert.same({ nil, "busy" }, { conn:try_lock(key, { shared = true }) })
        support.begin(conn, "lock", key)
        support.wait_until_waiting(conn.backend_pid)
        assert.equal("released", other:ask "release")
        local lock = support.complete(conn)

        assert.equal("False", other:ask("take", theirs, "try"))
        other:say("take", theirs)
        support.wait_until_waiting(pid)
        lock:release()
        assert.equal("True", other:answer())
        assert.equal("released", other:ask "release")
      end)

      it_with(case.there, "shares with us: " .. theirs, function()
        local other, conn = peer.start(case.command), support.connect()
        local shared = conn:lock(key, { shared = true })
        assert.equal("True", other:ask("take", theirs, "shared", "try"))
        assert.same({ nil, "busy" }, { support.connect():try_lock(key) })
        assert.equal("released", other:ask "release")
        shared:release()
      end)
    end
  end)
end

it_with(django, "advisory_lock is django-pglocks' form, by names that setup makes its", function()
  finally(function()
    pglocks.setup {}
    peer.finish()
  end)
  pglocks.setup { databases = { default = support.conninfo }, hash = "django-pglocks" }
  local other = peer.start(peers[1].command)
  other:ask("take", '"some lock"')
  local lock = pglocks.advisory_lock("some lock", { wait = false })
  assert.is_false(lock.acquired)
  other:ask "release"
  lock = pglocks.advisory_lock "some lock"
  assert.equal("False", other:ask("take", '"some lock"', "try"))
  lock:release()
end)

-- ---- a thousand names -------------------------------------------------------------------

-- Valid UTF-8 without NUL, which some of the systems could not take, of all small lengths.
local function names()
  local random, list = math.random, {}
  math.randomseed(42)
  local letters = { "a", "Z", "0", "9", "f", "F", " ", ",", "\"", "\127", "\194\128", "é", "日", "\239\191\189", "😀" }
  for i = 1, 1000 do
    local name = {}
    for j = 1, i % 50 + (i % 100 == 0 and 1000 or 0) do
      name[j] = random() < 0.5 and string.char(random(1, 127)) or letters[random(#letters)]
    end
    list[i] = table.concat(name)
  end
  for _, name in ipairs { "00000003,ffffffff", "FFFFFFFFffffffff", "0000000G00000000" } do list[#list + 1] = name end
  return list
end

local function hex(bytes)
  return (bytes:gsub(".", function(c) return ("%02x"):format(c:byte()) end))
end

local function in_hex(list)
  local out = {}
  for i, name in ipairs(list) do out[i] = hex(name) end
  return out
end

local function assert_keys(expected, list, options)
  assert.equal(#list, #expected)
  for i, name in ipairs(list) do
    local key = tostring(pglocks.key(name, options))
    if key ~= expected[i] then
      error(("%s of %q is %s, and %s expected"):format(options.hash, name, key, expected[i]), 2)
    end
  end
end

describe("a thousand names have the keys", function()
  local NAMES = names()

  local function on_server(expression, ...)
    local rows = support.observe(([[SELECT (%s)::text AS key FROM
      unnest(string_to_array($1, ',')) WITH ORDINALITY AS t(hex, number),
      convert_from(decode(hex, 'hex'), 'UTF8') AS name ORDER BY number]]):format(expression),
      table.concat(in_hex(NAMES), ","), ...)
    local keys = {}
    for i, row in ipairs(rows) do keys[i] = row.key end
    return keys
  end

  it("of the server's hashtext", function()
    assert_keys(on_server "hashtext(name)", NAMES, { hash = "hashtext" })
    assert_keys(on_server "hashtext(name)::bigint", NAMES, { hash = "laravel" })
  end)

  for _, seed in ipairs { "0", "1", "42", "-1", "4294967296", "-7612345678901234567", "9223372036854775807",
    "-9223372036854775808" } do
    it("of the server's hashtextextended with the seed " .. seed, function()
      assert_keys(on_server("hashtextextended(name, $2::bigint)", seed), NAMES,
        { hash = "hashtextextended", namespace = seed })
    end)
  end

  it("of the server's hashtextextended with namespaces, one in the other", function()
    for _, namespaces in ipairs { { "tenant-a" }, { "", "b" }, { "a", "naïve-日本", "c" } } do
      local seed = "0"
      for _, namespace in ipairs(namespaces) do
        seed = ("hashtextextended('%s', %s)"):format(namespace, seed)
      end
      assert_keys(on_server("hashtextextended(name, " .. seed .. ")"), NAMES,
        { hash = "npm-pg-advisory-lock", namespace = namespaces })
    end
  end)

  it("of the server's md5", function()
    assert_keys(on_server "('x' || substr(md5('good_jobs-' || name), 1, 16))::bit(64)::bigint", NAMES,
      { hash = "good_job", namespace = "good_jobs" })
  end)

  local path = os.tmpname()
  local file = assert(io.open(path, "w"))
  file:write(table.concat(in_hex(NAMES), "\n"), "\n")
  file:close()
  teardown(function() os.remove(path) end)

  for _, scheme in ipairs { "atlas", "distributedlock", "django-pglock", "django-pglocks", "flyway", "fnv1a64",
    "golang-migrate", "good_job", "heroku-pg_lock", "npm-advisory-lock", "pals", "py-postgresql-lock", "rails",
    "river", "sha256", "sqlalchemy-dlock", "sqlx", "sqlx-migrate", "symfony", "with_advisory_lock" } do
    local namespaces = { [""] = true }
    if scheme == "river" or scheme == "with_advisory_lock" then
      namespaces["123456"], namespaces["-1"] = true, true
    elseif scheme == "good_job" or scheme == "pals" or scheme == "sha256" then
      namespaces["naïve-日本"] = true
    end
    for namespace in pairs(namespaces) do
      it_with(python, ("of %s in Python%s"):format(scheme, namespace == "" and "" or ", namespace " .. namespace),
        function()
          local pipe = io.popen(("%s spec/interop/reference.py %s %s <%s 2>&1"):format(
            python, scheme, namespace, path))
          local keys = {}
          for line in pipe:lines() do keys[#keys + 1] = line end
          pipe:close()
          assert_keys(keys, NAMES, { hash = scheme, namespace = namespace ~= "" and namespace or nil })
        end)
    end
  end
end)
