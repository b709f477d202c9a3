# ruby-pg with parameters that are sent apart from the statement, as text.
require_relative "worker"
Worker.library("ruby-pg") { require "pg" }

KEY = 4242

connection = PG.connect(ARGV[0])

# Cleared at once: left to the garbage collection, the results of thousands of pairs would pile up.
Worker.serve(connection.backend_pid) do
  connection.exec_params("SELECT pg_advisory_lock($1)", [KEY]).clear
  connection.exec_params("SELECT pg_advisory_unlock($1)", [KEY]).clear
end
