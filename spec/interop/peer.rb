# The calls of with_advisory_lock on ruby-pg: reads commands from stdin, a line each, and answers
# each with a line. "take NAME [shared] [try]", NAME in JSON, holds the lock until "release".
require "json"
require "pg"
require "zlib"

$stdout.sync = true
connection = PG.connect

def keys(name)
  [Zlib.crc32(name), ENV["WITH_ADVISORY_LOCK_PREFIX"]].map { |part| part.to_i & 0x7fffffff }
end

name = mode = nil
$stdin.each_line(chomp: true) do |line|
  command, key, *words = line.split("\t")
  case command
  when "pid"
    puts connection.backend_pid
  when "take"
    name = JSON.parse(key)
    mode = words.include?("shared") ? "_shared" : ""
    try = words.include?("try") ? "try_" : ""
    result = connection.exec("SELECT pg_#{try}advisory_lock#{mode}(#{keys(name).join(",")}) AS taken")
    puts try.empty? || result[0]["taken"] == "t" ? "True" : "False"
  when "release"
    connection.exec("SELECT pg_advisory_unlock#{mode}(#{keys(name).join(",")})")
    puts "released"
  end
end
