# make bench-plot: the tables that `make bench` has left in build/bench/ as pictures, those that are there.

folder = "build/bench/"
set datafile separator comma
set datafile missing NaN # a line goes on past the rows of others
set terminal svg size 900,600 font "sans-serif,13" background "white" noenhanced
set style fill solid 0.6 noborder
set boxwidth 0.7
set grid
set key top left

is_there(name) = int(system("test -e " . folder . name . ".csv && echo 1 || echo 0"))
csv(name) = folder . name . ".csv"
svg(name) = folder . name . ".svg"

set xtics rotate by -45
set yrange [0:*]
set bmargin 9
set rmargin 12

# With the quartiles of each.
do for [name in "pairs-same pairs-cross pairs-tcp"] {
  if (is_there(name)) {
    set output svg(name)
    set title "Pairs a second, to C text (" . name . ")"
    plot csv(name) every ::1 using 0:3:xtic(1) with boxes notitle, \
         csv(name) every ::1 using 0:3:4:5 with yerrorbars notitle linecolor "black" pointsize 0
    unset output
  }
}

if (is_there("network")) {
  set output svg("network")
  set title "Pairs a second over a network, to C text"
  set boxwidth
  set style data histogram
  plot csv("network") every ::1 using 3:xtic(1) title "0 ms", "" every ::1 using 5 title "1 ms", \
       "" every ::1 using 7 title "10 ms"
  unset output
}

unset bmargin
unset rmargin
set xtics norotate
set logscale x

if (is_there("contention")) {
  set output svg("contention")
  set title "Jain fairness of processes that take turns at one key"
  set xlabel "processes"
  set yrange [0:1.05]
  set key bottom left
  plot for [who in '"C text" "Lua 5.4 confirmed" "LuaJIT confirmed" "C poll"'] \
    csv("contention") using (strcol(1) eq who ? $2 : NaN):4 with linespoints title who
  unset output
}

if (is_there("scale")) {
  set output svg("scale")
  set title "Milliseconds to lock and release many keys"
  set xlabel "keys"
  set autoscale y
  set logscale y
  set key top left
  plot for [who in '"C" "Lua 5.4" "LuaJIT"'] \
         csv("scale") using (strcol(1) eq who ? $2 : NaN):3 with linespoints title who . ", one by one", \
       for [who in '"C" "Lua 5.4" "LuaJIT"'] \
         csv("scale") using (strcol(1) eq who ? $2 : NaN):5 with linespoints title who . ", at once"
  unset output
}
