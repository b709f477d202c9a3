--- What the benchmarks share: medians, and tables of plain text.

local numbers = {}

--- The value that the share `share` of a list is not above. Sorts the list.
function numbers.percentile(list, share)
  if #list == 0 then return 0 / 0 end
  table.sort(list)
  return list[1 + math.floor(share * (#list - 1) + 0.5)]
end

function numbers.median(list)
  if #list == 0 then return 0 / 0 end
  table.sort(list)
  return (list[math.floor((#list + 1) / 2)] + list[math.ceil((#list + 1) / 2)]) / 2
end

--- One round measures all candidates in turn, the next one backwards, so that what drifts hits each
--- alike. Returns by candidate the list of what measure(candidate) returned, by round.
function numbers.rounds(candidates, count, measure)
  local found = {}
  for _, candidate in ipairs(candidates) do found[candidate] = {} end
  for round = 1, count do
    local first, last, step = 1, #candidates, 1
    if round % 2 == 0 then first, last, step = #candidates, 1, -1 end
    for place = first, last, step do
      found[candidates[place]][round] = measure(candidates[place])
    end
  end
  return found
end

--- The ratios of two lists, round by round: their median, and as a text how far they are apart.
function numbers.ratio(list, base)
  local ratios = {}
  for round = 1, #list do ratios[round] = list[round] / base[round] end
  local median = numbers.median(ratios)
  return median, ("%.2f..%.2f"):format(ratios[1], ratios[#ratios])
end

--- 12345.6 -> "12,346"
function numbers.whole(number)
  local text = ("%.0f"):format(number)
  repeat
    local count
    text, count = text:gsub("^(%d+)(%d%d%d)", "%1,%2")
  until count == 0
  return text
end

--- Prints rows of cells: the first column to the left, all others to the right.
function numbers.print_table(title, rows)
  local widths = {}
  for _, row in ipairs(rows) do
    for column, cell in ipairs(row) do widths[column] = math.max(widths[column] or 0, #cell) end
  end
  print(("\n%s"):format(title))
  for _, row in ipairs(rows) do
    local cells = {}
    for column, cell in ipairs(row) do
      cells[column] = ("%" .. (column == 1 and "-" or "") .. widths[column] .. "s"):format(cell)
    end
    print("  " .. table.concat(cells, "  "))
  end
  io.stdout:flush()
end

return numbers
