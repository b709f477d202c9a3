rockspec_format = "3.0"
package = "pglocks"
version = "scm-1"

source = {
  url = "git+https://github.com/pglocks/pglocks.git",
}

description = {
  summary = "PostgreSQL advisory locks that are released when a scope ends",
  detailed = [[
    Locks that all machines share that use one PostgreSQL database. A lock is released when its
    scope ends, however it ends; it is truthfully held or not; waiting for one blocks no event
    loop; and many locks live on few connections. For Lua 5.4, LuaJIT and OpenResty.
  ]],
  homepage = "https://github.com/pglocks/pglocks",
  license = "MIT",
  labels = { "postgresql", "lock", "mutex", "advisory-lock", "openresty" },
}

dependencies = {
  "lua >= 5.1",
}

external_dependencies = {
  PQ = { header = "libpq-fe.h", library = "pq" },
  CRYPTO = { header = "openssl/evp.h", library = "crypto" },
  ZLIB = { header = "zlib.h", library = "z" },
}

build = {
  type = "builtin",
  modules = {
    ["pglocks"] = "lua/pglocks/init.lua",
    ["pglocks.all_locks"] = "lua/pglocks/all_locks.lua",
    ["pglocks.connect"] = "lua/pglocks/connect.lua",
    ["pglocks.modes"] = "lua/pglocks/modes.lua",
    ["pglocks.patience"] = "lua/pglocks/patience.lua",
    ["pglocks.lead"] = "lua/pglocks/lead.lua",
    ["pglocks.link"] = "lua/pglocks/link.lua",
    ["pglocks.locker"] = "lua/pglocks/locker.lua",
    ["pglocks.pool"] = "lua/pglocks/pool.lua",
    ["pglocks.scheduled"] = "lua/pglocks/scheduled.lua",
    ["pglocks.scheduler.cqueues"] = "lua/pglocks/scheduler/cqueues.lua",
    ["pglocks.scheduler.luv"] = "lua/pglocks/scheduler/luv.lua",
    ["pglocks.scheduler.nginx"] = "lua/pglocks/scheduler/nginx.lua",
    ["pglocks.scope"] = "lua/pglocks/scope.lua",
    ["pglocks.selftest"] = "lua/pglocks/selftest.lua",
    ["pglocks.turns"] = "lua/pglocks/turns.lua",
    ["pglocks.types"] = "lua/pglocks/types.lua",
    ["resty.pglocks"] = "lua/resty/pglocks.lua",
    ["pglocks.core"] = {
      sources = {
        "src/module.c",
        "src/connection.c",
        "src/session.c",
        "src/operation.c",
        "src/command.c",
        "src/holding.c",
        "src/names.c",
        "src/lock.c",
        "src/options.c",
        "src/share.c",
        "src/transaction.c",
        "src/notify.c",
        "src/query.c",
        "src/key.c",
        "src/scheme.c",
        "src/digest.c",
      },
      libraries = { "pq", "crypto", "z", "pthread" },
      incdirs = { "$(PQ_INCDIR)", "$(CRYPTO_INCDIR)", "$(ZLIB_INCDIR)" },
      libdirs = { "$(PQ_LIBDIR)", "$(CRYPTO_LIBDIR)", "$(ZLIB_LIBDIR)" },
    },
  },
}

test = {
  type = "command",
  command = "make test",
}
