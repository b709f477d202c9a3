--- A server and clients on a network of their own, so that a spec can cut it: namespaces of the
--- kernel's, each client's joined to the server's by a veth pair.
---
---     local net = network.start()
---     local link = net:link()
---     local client = link:spawn("client.lua", link.conninfo)
---     link:cut { "to_server", "to_client" }
---
--- The machine's own network stays as it is, and nothing has a name outside: any number of these
--- may run side by side. Nor has anything to be undone: a namespace goes with its last process, its
--- links and rules go with it, and those processes end when this one does, however that happens.

local support = require "spec.support"

local network = {}
network.__index = network

local Link = {}
Link.__index = Link

--- Seconds after which a client is ended, whatever it is at.
local CLIENT_LIFE = 150

--- Why there can be no such network here; nil: it can be had.
function network.unavailable()
  if support.shell "id -u" ~= "0\n" then return "only root may make network namespaces" end
  for _, program in ipairs { "ip", "nft", "ss", "nsenter", "unshare" } do
    if support.shell("command -v " .. program) == "" then return program .. " is not installed" end
  end
  for _, try in ipairs {
    "unshare -n ip link add here type veth peer name there",
    "unshare -n nft add table inet cut",
    "tools/pg-bindir >/dev/null",
  } do
    local said = support.shell(try)
    if said ~= "" then return ("`%s` says: %s"):format(try, said:match "[^\n]*") end
  end
end

-- Says nothing when it works.
local function run(command, ...)
  local said = support.shell(command:format(...))
  if said ~= "" then error(said, 2) end
end

-- Starts a command of the shell that prints something first: returns that line.
local function start(command, ...)
  local pipe = assert(io.popen(command:format(...)))
  return pipe, assert(pipe:read "*l", "it did not start")
end

-- For a command that shall run in a namespace until this process ends, and no longer. $PPID is this
-- process for a shell that io.popen starts.
local STAY = 'exec tail --pid="$spec" -f /dev/null'

--- Starts a PostgreSQL server, on every address of its namespace and, as `conninfo`, on a Unix
--- socket for the spec. `folder` goes with it.
function network.start()
  local self = setmetatable({ links = {} }, network)
  -- tools/with-postgres looks after the server. It starts it on 127.0.0.1, before there are others.
  -- A signal to all of the specs' processes must not meet it: it has to clean up after them.
  local pipe, line = start([[
    export spec=$PPID
    unset PGLOCKS_TEST_CONNINFO
    exec setsid unshare -n sh -c 'ip link set lo up && exec tools/with-postgres sh -c "$0" 2>&1' '
      cd "$PGLOCKS_TEST_DATA" &&
      echo "listen_addresses = '"'*'"'" >>postgresql.conf &&
      echo "host all all 192.0.2.0/24 trust" >>pg_hba.conf &&
      $PGLOCKS_TEST_AS_SERVER "$PGLOCKS_TEST_BINDIR/pg_ctl" -D . -l ../log -s -w restart &&
      echo "$$ $PPID $PGLOCKS_TEST_CONNINFO" && %s'
  ]], STAY)
  self.pipe, self.pid, self.ends, self.conninfo = pipe, line:match "^(%d+) (%d+) (.*)$"
  assert(self.conninfo, line)
  self.folder, self.port = self.conninfo:match "host=(%S+) port=(%d+)"
  return self
end

--- Joins another namespace to the server's. `conninfo` is the server as seen from there.
function network:link()
  local number = #self.links + 1
  local link = setmetatable({
    server = self.pid,
    name = "client" .. number,
    address = "192.0.2." .. 4 * number + 2,
    conninfo = ("host=192.0.2.%d port=%s dbname=postgres user=postgres"):format(
      4 * number + 1, self.port),
  }, Link)
  link.pipe, link.pid = start(
    [[spec=$PPID; export spec; exec unshare -n sh -c 'ip link set lo up && echo $$ && %s']], STAY)
  self.links[number] = link
  run([[nsenter -t %s -n sh -c 'ip link add %s type veth peer name server netns %s &&
    ip addr add 192.0.2.%d/30 dev %s && ip link set %s up']],
    self.pid, link.name, link.pid, 4 * number + 1, link.name, link.name)
  run([[nsenter -t %s -n sh -c 'ip addr add %s/30 dev server && ip link set server up']],
    link.pid, link.address)
  return link
end

--- Ends it all.
function network:stop()
  for _, link in ipairs(self.links) do
    support.signal("TERM", link.pid)
    link.pipe:close()
  end
  support.signal("TERM", self.ends)
  self.pipe:close()
end

--- Starts a Lua file in the client's namespace, with this runtime: its `lines`, stderr included.
function Link:spawn(path, ...)
  local words = { "exec timeout", CLIENT_LIFE, "nsenter -t", self.pid, "-n",
    os.getenv "PGLOCKS_TEST_LUA" or "lua", path }
  for i = 1, select("#", ...) do words[#words + 1] = "'" .. select(i, ...) .. "'" end
  local pipe = assert(io.popen(table.concat(words, " ") .. " 2>&1"))
  return { lines = pipe:lines(), close = function() pipe:close() end }
end

--- The server's retransmissions to this client begin after so many seconds, as they do where a
--- round trip takes 0.2 s less.
function Link:set_retransmission(seconds)
  run("nsenter -t %s -n ip route replace %s dev %s rto_min %dms",
    self.server, self.address, self.name, seconds * 1000)
end

--- Seconds for which that connection of the client's has received nothing that has so the longest.
function Link:silence()
  local said, longest = support.shell(("nsenter -t %s -n ss -Htni"):format(self.pid)), 0
  for data, acknowledgement in said:gmatch "lastrcv:(%d+) lastack:(%d+)" do
    longest = math.max(longest, math.min(tonumber(data), tonumber(acknowledgement)) / 1000)
  end
  return longest
end

-- What is thrown away is thrown away where it arrives: for who sent it that is silence, where a
-- rule on its own side would be an error.
local function rule(pid, interface, verdict)
  run([[nsenter -t %s -n nft 'add table inet cut_%s;
    add chain inet cut_%s input { type filter hook input priority 0; };
    add rule inet cut_%s input iifname "%s" %s']],
    pid, interface, interface, interface, interface, verdict)
end

--- Throws away what is sent "to_server", "to_client", or both: { "to_server", "to_client" }.
function Link:cut(directions)
  for _, direction in ipairs(directions) do
    if direction == "to_server" then
      rule(self.server, self.name, "drop")
    else
      rule(self.pid, "server", "drop")
    end
  end
end

--- Answers whatever the client sends with an RST, as a firewall may.
function Link:reject()
  rule(self.server, self.name, "meta l4proto tcp reject with tcp reset")
end

--- Ends its connections with an RST to it. Returns why not, where the kernel cannot do that.
function Link:reset()
  local said = support.shell(("nsenter -t %s -n ss -K dst %s"):format(self.server, self.address))
  return said:match "[^\n]*not supported"
end

--- Takes the client's own link down.
function Link:down()
  run("nsenter -t %s -n ip link set server down", self.pid)
end

--- Puts everything right again.
function Link:heal()
  run("nsenter -t %s -n ip link set server up", self.pid)
  run("nsenter -t %s -n nft flush ruleset", self.pid)
  run([[nsenter -t %s -n sh -c 'nft list table inet cut_%s >/dev/null 2>&1 || exit 0
    nft delete table inet cut_%s']], self.server, self.name, self.name)
end

return network
