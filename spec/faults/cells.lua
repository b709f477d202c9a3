--- What may go wrong, and in which phase of a connection; and what is guaranteed whatever does. For
--- each there is a spec, named by it: cells_spec.lua looks.

local ALL = "connecting waiting holding releasing idle"

return {
  -- The number of a fault, the fault, and the phases in which it can occur.
  rows = {
    { "1", "no room, not there yet (53300, 57P03, refused)", "connecting holding releasing idle" },
    { "2", "a host that says nothing, of several", "connecting" },
    { "3", "a server that accepts, and says nothing", ALL },
    { "4", "a partition of the network", ALL },
    { "5", "a partition in one direction", ALL },
    { "6", "a partition shorter than all time-outs", ALL },
    { "7", "RST, link down", ALL },
    { "8", "pg_terminate_backend, time-outs of the session and the transaction", ALL },
    { "9", "pg_cancel_backend, PQcancel, statement_timeout", ALL },
    { "10", "lock_timeout at the moment of the grant", "waiting" },
    { "11", "deadlock", "waiting holding" },
    { "12", "kill -9 of a backend, and with it of all", ALL },
    { "13", "stop, fast and immediate, and restart", ALL },
    { "13b", "stop, smart; reload", ALL },
    { "14", "a standby", "connecting" },
    { "15", "a failover while the old primary lives", "connecting waiting holding idle" },
    { "16", "a full lock table (53200)", ALL },
    { "17", "kill -9 of the client", "waiting holding releasing" },
    { "18", "a long pause of the client", ALL },
    { "19", "fork", ALL },
    { "20", "an error, break, goto, return in the body", "holding" },
    { "21", "a coroutine left alone, the end of the program", "holding releasing idle" },
    { "22", "no memory", "connecting waiting holding releasing" },
    { "23", "a pooler of transactions or statements", "connecting holding releasing" },
    { "24", "DISCARD ALL, pg_advisory_unlock_all", "holding releasing" },
    { "25", "a second coroutine", ALL },
    { "26", "signals", ALL },
    { "27", "a wall clock that jumps", ALL },
    { "28", "an aborted transaction", "waiting holding releasing idle" },
    { "29", "hostile schemas, functions, operators and settings", ALL },
  },
}
