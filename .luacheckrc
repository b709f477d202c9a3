max_line_length = 120

-- What Lua 5.4 and LuaJIT both have; a file that is for one of them says so here.
std = "min"
read_globals = { table = { fields = { "unpack" } } }

files["spec"] = { std = "max+busted" }
files["spec/lua54"] = { std = "lua54+busted" }
files["demo"] = { std = "lua54" }
files["lua/pglocks/scheduler/nginx.lua"] = { std = "ngx_lua" }
files["lua/resty"] = { std = "ngx_lua" }
