max_line_length = 120

-- What Lua 5.4 and LuaJIT have both; a file for one of them is named below.
std = "min"
read_globals = { table = { fields = { "unpack" } } }

-- A lock in a scope is held, not used.
local scopes = { std = "lua54+busted", ignore = { "211" } }
files["spec"] = { std = "max+busted" }
files["spec/lua54"] = scopes
files["demo"] = scopes
files["bench/parts"] = { std = "lua54" }
files["bench/workers.lua"] = { std = "lua54" }
files["lua/pglocks/scheduler/nginx.lua"] = { std = "ngx_lua" }
files["lua/resty"] = { std = "ngx_lua" }
