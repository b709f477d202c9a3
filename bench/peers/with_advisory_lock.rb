# with_advisory_lock on ActiveRecord, where the user has put them: as gems, or found by RUBYLIB. Its
# key is a hash of the name, and not 4242. While the lock is held elsewhere it does not wait in the
# server, but asks again after some 100 ms.
require_relative "worker"
Worker.library("ruby-pg") { require "pg" }
Worker.library("activerecord") { require "active_record" }
Worker.library("with_advisory_lock") { require "with_advisory_lock" }

options = PG::Connection.conninfo_parse(ARGV[0]).reject { |option| option[:val].nil? }
                        .to_h { |option| [option[:keyword].to_sym, option[:val]] }
ActiveRecord::Base.establish_connection(adapter: "postgresql", **options)

class Model < ActiveRecord::Base; end

Worker.serve(Model.connection.select_value("SELECT pg_backend_pid()")) do
  Model.with_advisory_lock("4242") {}
end
