-- The keys of other systems. The numbers are from their own documentation and tests, or were made
-- with their code; spec/interop compares a thousand more.

local pglocks = require "pglocks"
local support = require "spec.support"

local key, assert_raises = pglocks.key, support.assert_raises

--- Calls of these have a name in messages, which what pcall calls itself has not.
local function make(...)
  local made = key(...)
  return made
end

local NAMES = { "", "some lock", "invoice 42", "naïve-日本", ("x"):rep(1000) }

-- { hash, namespace, one key for each of the names }
local VECTORS = {
  { "sha256", nil, "-2039914840885289964", "-5006958056254205714", "-8336654015406136946",
    "5167079205337725586", "4969780757471279619" },
  { "atlas", nil, "2166136261", "1642351250", "768478616", "1242521240", "3401822501" },
  { "distributedlock", nil, "(2147483647, -1)", "(-406884780, 456647638)", "-6803892316269679239",
    "-3582873679304927082", "3376925640998973379" },
  { "django-pglock", nil, "1449310910991872227", "-1292339565357005894", "-8205168553754538356",
    "-7891865447792396985", "268709184000096324" },
  { "django-pglocks", nil, "0", "-205618829", "-80148152", "-349992043", "994167270" },
  { "flyway", nil, "77431708279161", "77431065942608", "77433620083146", "77432992661282", "77429992861049" },
  { "fnv1a64", nil, "-3750763034362895579", "1014557119937645388", "-3174466707283773222",
    "8101688620672310670", "-2184859513441168699" },
  { "golang-migrate", nil, "0", "4105892545", "163135896", "2871114775", "2112881282" },
  { "good_job", nil, "-3162216497309240828", "-8898428844766512136", "2353493217252433661",
    "-25513985584120223", "4144776019855927798" },
  { "hashtext", nil, "-1477818771", "-1040551200", "1326070994", "-1351335017", "-1157355676" },
  { "hashtextextended", nil, "-6939563903564495251", "1837249113968243424", "-185570009227313966",
    "6789014009836487575", "8373529910559647588" },
  { "heroku-pg_lock", nil, "(-2147483648, 0)", "(-2147483648, -205618829)", "(-2147483648, -80148152)",
    "(-2147483648, -349992043)", "(-2147483648, 994167270)" },
  { "laravel", nil, "-1477818771", "-1040551200", "1326070994", "-1351335017", "-1157355676" },
  { "npm-advisory-lock", nil, "(1120186595, 337443992)", "(766935994, -300896253)", "(1463897740, -1910414676)",
    "(690468167, -1837468112)", "(1144387652, 62563732)" },
  { "npm-pg-advisory-lock", nil, "-6939563903564495251", "1837249113968243424", "-185570009227313966",
    "6789014009836487575", "8373529910559647588" },
  { "npm-pg-advisory-lock", "tenant-a", "-8636969380294973102", "-7579670756183032820", "5280938104894256431",
    "2020595106165443582", "9020685774801643707" },
  { "pals", nil, "957977401221134810", "4606145517355168434", "-6803892316269679239",
    "-3582873679304927082", "3376925640998973379" },
  { "pals", "app", "6613528950128151722", "-6639826988493115813", "7652994962947048593",
    "3001592450297460969", "3026191183664345602" },
  { "py-postgresql-lock", nil, "-2721964255587120371", "-5588203449678238657", "8749857076441224097",
    "-7577044563134298162", "-4328057575275766482" },
  { "rails", nil, "0", "8397325137242208615", "8654974510598704680", "8100860106479974785",
    "2041485550660083150" },
  { "river", nil, "-3750763034362895579", "3791753790447769074", "866910458669326616",
    "-7184094399419919848", "-1201118281315319675" },
  { "river", 123456, "530241648631237", "530241124846226", "530240250973592", "530240725016216",
    "530242884317477" },
  { "sqlalchemy-dlock", nil, "-5426141060434712860", "6608187779631272224", "-6886188082928651174",
    "-108485081610303778", "1695065728218771610" },
  { "sqlx", nil, "8559922135585776354", "6271170656219728432", "-2386497885289690109",
    "-3657464629979892138", "7820946800567525258" },
  { "sqlx-migrate", nil, "0", "4198662566576430074", "4327487253191942768", "4050430051267499766",
    "1020742774832957940" },
  { "symfony", nil, "0", "4089348467", "4214819144", "3944975253", "994167270" },
  { "with_advisory_lock", nil, "(0, 0)", "(1941864819, 0)", "(2067335496, 0)", "(1797491605, 0)",
    "(994167270, 0)" },
  { "with_advisory_lock", 7, "(0, 7)", "(1941864819, 7)", "(2067335496, 7)", "(1797491605, 7)",
    "(994167270, 7)" },
}

describe("names have the keys", function()
  for _, vector in ipairs(VECTORS) do
    local hash, namespace = vector[1], vector[2]
    it(("of %s%s"):format(hash, namespace and ", namespace " .. namespace or ""), function()
      for i, name in ipairs(NAMES) do
        assert.equal(vector[2 + i], tostring(key(name, { hash = hash, namespace = namespace })))
      end
    end)
  end

  for _, case in ipairs {
    { "a .NET test of DistributedLock", "distributedlock", "AmbTrans", "(-2085153458, 1484223359)" },
    { "another one", "distributedlock", ("漢"):rep(18), "-5707277204051710361" },
    { "DistributedLock's pairs", "distributedlock", "00000003,ffffffff", "(3, -1)" },
    { "DistributedLock's pairs", "distributedlock", "00000003,FFFFFFFF", "(3, -1)" },
    { "DistributedLock's numbers", "distributedlock", "0000000000000001", "1" },
    { "DistributedLock's numbers", "distributedlock", "FFFFFFFFffffffff", "-1" },
    { "DistributedLock's numbers", "distributedlock", "0123456789abcdef", "81985529216486895" },
    { "DistributedLock's numbers", "distributedlock", "0123456789ABCDEF", "81985529216486895" },
    { "sqlx's documentation", "sqlx", "my first Postgres advisory lock!", "-5560419505042474287" },
    { "goose", "goose", "goose", "4097083626" },
    { "golang-migrate's default", "golang-migrate", "public\0schema_migrations\0postgres", "143310882" },
    { "a Rails database", "rails", "postgres", "737815420147457505" },
    { "a database of sqlx", "sqlx-migrate", "postgres", "368907709894077238" },
    { "Flyway's default", "flyway", '"public"."flyway_schema_history"', "77433833903597" },
  } do
    it(("of %s: %q"):format(case[1], case[3]), function()
      assert.equal(case[4], tostring(key(case[3], { hash = case[2] })))
    end)
  end

  it("of Flyway, which quotes schema and table", function()
    local function flyway(name, namespace) return key(name, { hash = "flyway", namespace = namespace }) end
    assert.equal("77433833903597", tostring(flyway("flyway_schema_history", "public")))
    assert.equal(flyway '"a ""b""".""""', flyway('"', 'a "b"'))
    assert.not_equal(flyway '"a"."b"', flyway "a.b")
    assert.equal(flyway '""."日😀"', flyway("日😀", ""))
  end)

  it("of DistributedLock, short ones and long ones", function()
    local function lock(name) return tostring(key(name, { hash = "distributedlock" })) end
    assert.is_truthy(lock("123456789"):find "^%(")
    assert.is_falsy(lock("1234567890"):find "^%(")
    assert.is_falsy(lock("é"):find "^%(")
    for _, name in ipairs { "0000000g00000000", "00000003;ffffffff", "00000003,fffffffg", "g0000003,ffffffff",
      "0000000000000000 ", "0000000\00000000" } do
      assert.equal(tostring(key(name, { hash = "pals" })), lock(name)) -- the digest
    end
  end)

  it("of a prefix that comes as a text, as from the environment", function()
    for _, case in ipairs { { "with_advisory_lock", 7, "7" }, { "with_advisory_lock", -7, "-7" },
      { "with_advisory_lock", 7, "+007" }, { "river", 123456, "123456" }, { "hashtextextended", -1, "-1" } } do
      assert.equal(key("a", { hash = case[1], namespace = case[2] }), key("a", { hash = case[1], namespace = case[3] }))
    end
  end)

  it("of no seed, where that is 0", function()
    assert.equal(key("a", { hash = "hashtextextended" }), key("a", { hash = "hashtextextended", namespace = 0 }))
    assert.not_equal(key("a", { hash = "npm-pg-advisory-lock" }),
      key("a", { hash = "npm-pg-advisory-lock", namespace = "" }))
    assert.not_equal(key("a", { hash = "river" }), key("a", { hash = "river", namespace = 0 }))
  end)

  it("of namespaces one in the other", function()
    local function lock(namespace) return key("a", { hash = "npm-pg-advisory-lock", namespace = namespace }) end
    assert.equal(lock "outer", lock { "outer" })
    assert.not_equal(lock { "outer", "inner" }, lock { "inner", "outer" })
    assert.not_equal(lock { "outer", "inner" }, lock "outer")
  end)

  it("and all bytes of the name count", function()
    local hashes = {}
    for _, vector in ipairs(VECTORS) do hashes[vector[1]] = true end
    hashes.goose, hashes.flyway = nil, nil
    for hash in pairs(hashes) do
      local seen = {}
      for _, name in ipairs { "a", "a\0", "a\0b", "a\0c", "\0a", "\255", "\254" } do
        local shown = tostring(key(name, { hash = hash }))
        assert.is_nil(seen[shown], hash)
        seen[shown] = true
      end
    end
  end)
end)

describe("a scheme", function()
  it("refuses a namespace that it does not know", function()
    for _, hash in ipairs { "atlas", "distributedlock", "django-pglock", "django-pglocks", "fnv1a64", "golang-migrate",
      "goose", "hashtext", "heroku-pg_lock", "laravel", "npm-advisory-lock", "py-postgresql-lock", "rails",
      "sqlalchemy-dlock", "sqlx", "sqlx-migrate", "symfony" } do
      for _, namespace in ipairs { "", "app", 7 } do
        assert_raises(("bad argument #2 to 'key' (hash '%s' takes no namespace)"):format(hash),
          make, "goose", { hash = hash, namespace = namespace })
      end
    end
  end)

  it("refuses a namespace of a wrong type", function()
    for _, case in ipairs {
      { "pals", "a string", 7, { "a" } },
      { "good_job", "a string", 7, { "a" } },
      { "flyway", "a string", 7, { "a" } },
      { "npm-pg-advisory-lock", "a string or a list of strings", 7 },
      { "river", "a 32-bit integer", "app", "", "7 ", " 7", "0x7", "7.0", 2 ^ 31, -2 ^ 31 - 1, { "7" }, "7\0" },
      { "with_advisory_lock", "a 64-bit integer", "app", "", "7a", "9223372036854775808", { "7" } },
      { "hashtextextended", "a 64-bit integer", "app", "1e3", { "7" } },
    } do
      for i = 3, #case do
        assert_raises(("bad argument #2 to 'key' (hash '%s' takes %s as its namespace)"):format(case[1], case[2]),
          make, "a", { hash = case[1], namespace = case[i] })
      end
    end
  end)

  it("refuses a name that can be nobody's", function()
    assert_raises("bad argument #1 to 'key' (hash 'goose': the one lock of goose has the name 'goose')",
      make, "app", { hash = "goose" })
    for _, name in ipairs { "\255", "a\128", "\192\128", "\224\159\191", "\237\160\128", "\244\144\128\128",
      "\240\143\191\191", "\248\136\128\128\128", "\252\128\128\128", "\226\130", "\194" } do
      assert_raises("bad argument #1 to 'key' (hash 'flyway': the name must be UTF-8 here)",
        make, name, { hash = "flyway" })
    end
    assert_raises("hash 'flyway': the name must be UTF-8 here", make, "a", { hash = "flyway", namespace = "\255" })
  end)
end)

describe("a scheme of one's own", function()
  after_each(function()
    pglocks.setup {}
    support.finish()
  end)

  it("is a function from the name to a key", function()
    local function by_length(name) return #name end
    local function by_pair(name) return { 7, #name } end
    local function by_key(name) return key(name, { hash = "symfony" }) end
    assert.equal(key(9), key("some lock", { hash = by_length }))
    assert.equal(key { 7, 9 }, key("some lock", { hash = by_pair }))
    assert.equal("4089348467", tostring(key("some lock", { hash = by_key })))
    local lock = support.connect():lock("some lock", { hash = by_pair })
    assert.equal(key { 7, 9 }, lock.key)
    assert.equal("some lock", lock.name)
  end)

  it("gets the namespace, too", function()
    local got
    local function hash(...)
      got = { n = select("#", ...), ... }
      return 1
    end
    for _, namespace in ipairs { "app", 7, { "a", "b" } } do
      key("a\0b", { hash = hash, namespace = namespace })
      assert.same({ n = 2, "a\0b", namespace }, got)
    end
    key("a", { hash = hash })
    assert.same({ n = 2, "a" }, got)
  end)

  it("may be the default, with a namespace", function()
    local function hash(name, namespace) return { #name, namespace and #namespace or -1 } end
    pglocks.setup { hash = hash }
    collectgarbage()
    assert.equal(key { 9, -1 }, key "some lock")
    assert.equal(key { 9, 3 }, key("some lock", { namespace = "app" }))
    pglocks.setup { hash = hash, namespace = "application" }
    assert.equal(key { 9, 11 }, key "some lock")
    assert.equal(key { 9, 3 }, key("some lock", { namespace = "app" }))
    assert.equal(key(11), key("some lock", { hash = function(_, namespace) return #namespace end }))
    assert.equal(key("some lock", { hash = "pals", namespace = "application" }), key("some lock", { hash = "pals" }))
    assert.equal(key(42), key(42))
  end)

  it("is asked for a key, and nothing else", function()
    local WHAT = "what the 'hash' function returned: "
    for _, case in ipairs {
      { "integer, pair of integers or key expected, got string", "some lock" },
      { "integer, pair of integers or key expected, got string", "42" },
      { "integer, pair of integers or key expected, got nil", nil },
      { "integer, pair of integers or key expected, got boolean", true },
      { "number has no exact representation as a 64-bit integer", 1.5 },
      { "number has no exact representation as a 64-bit integer", 2 ^ 63 },
      { "a pair of 32-bit integers expected, got another table", { 1 } },
      { "a pair of 32-bit integers expected, [2] is out of range", { 1, 2 ^ 31 } },
      { "a pair of 32-bit integers expected, [1] is string", { "1", 2 } },
    } do
      assert_raises(("bad argument #2 to 'key' (%s%s)"):format(WHAT, case[1]),
        make, "a", { hash = function() return case[2] end })
    end
    assert_raises(WHAT .. "integer, pair of integers or key expected, got nil", make, "a", { hash = function() end })
  end)

  it("may raise, and nothing is locked", function()
    local conn, reason = support.connect(), {}
    local err = support.raised(conn.lock, conn, "a", { hash = function() error(reason) end })
    assert.equal(reason, err)
    assert.same({}, conn:locks())
    assert.same({}, support.pg_locks(conn.backend_pid))
    assert.is_true(conn:lock("a"):release())
  end)

  it("is for names only", function()
    assert_raises("option 'hash' is for names only", make, 42, { hash = function() return 1 end })
  end)
end)

it("setup makes any scheme the default", function()
  finally(function() pglocks.setup {} end)
  for _, vector in ipairs(VECTORS) do
    pglocks.setup { hash = vector[1], namespace = vector[2] }
    assert.equal(vector[4], tostring(key(NAMES[2])))
  end
end)
