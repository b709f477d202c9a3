# What the peers in Ruby share: see worker.lua.
module Worker
  module_function

  # The block requires the library, which may not be there: then the peer says so and ends.
  def library(name)
    yield
  rescue LoadError
    warn "#{name} is not installed"
    exit 3
  end

  def clock(id = Process::CLOCK_MONOTONIC) = Process.clock_gettime(id)

  def run(milliseconds)
    finish = clock + milliseconds / 1000.0
    count = 0
    loop do
      10.times { yield }
      count += 10
      return count if clock >= finish
    end
  end

  def count(number, &pair)
    number.times(&pair)
    number
  end

  # Serves until the end of the input; the block is a pair.
  def serve(server_pid, &pair)
    $stdout.sync = true
    puts "ready #{server_pid}"
    $stdin.each_line do |line|
      command, argument = line.split
      raise ArgumentError, line unless %w[run count].include?(command)

      began = clock
      cpu = clock(Process::CLOCK_PROCESS_CPUTIME_ID)
      done = send(command, argument.to_i, &pair)
      elapsed = clock - began
      used = clock(Process::CLOCK_PROCESS_CPUTIME_ID) - cpu
      puts format("%d %.6f %.6f", done, elapsed, used)
    end
  end
end
