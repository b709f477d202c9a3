--- What the benchmarks share: medians, and tables of plain text, also as CSV.

local numbers = {}

local function sorted(list)
  local copy = {}
  for place, value in ipairs(list) do copy[place] = value end
  table.sort(copy)
  return copy
end

--- The value that the share `share` of a list is not above.
function numbers.percentile(list, share)
  if #list == 0 then return 0 / 0 end
  return sorted(list)[1 + math.floor(share * (#list - 1) + 0.5)]
end

function numbers.median(list)
  if #list == 0 then return 0 / 0 end
  list = sorted(list)
  return (list[math.floor((#list + 1) / 2)] + list[math.ceil((#list + 1) / 2)]) / 2
end

--- One field of each of a list of tables, times a factor.
function numbers.list(results, field, factor)
  local list = {}
  for place, result in ipairs(results) do list[place] = result[field] * (factor or 1) end
  return list
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

--- The ratios of two lists, round by round.
function numbers.ratios(list, base)
  local ratios = {}
  for round = 1, #list do ratios[round] = list[round] / base[round] end
  return ratios
end

--- Their median, and as a text how far they are apart.
function numbers.ratio(list, base)
  local ratios = sorted(numbers.ratios(list, base))
  return numbers.median(ratios), ("%.2f..%.2f"):format(ratios[1], ratios[#ratios])
end

--- How alike the shares are (Jain): 1 if all are the same, 1/n if one of n has everything.
function numbers.fairness(list)
  local sum, squares = 0, 0
  for _, share in ipairs(list) do
    sum = sum + share
    squares = squares + share * share
  end
  return sum * sum / (#list * squares)
end

--- 12345.6 -> "12,346"
function numbers.whole(number)
  local text = ("%.0f"):format(number)
  repeat
    local count
    text, count = text:gsub("^(-?%d+)(%d%d%d)", "%1,%2")
  until count == 0
  return text
end

--- Prints rows of cells: the first column to the left, all others to the right.
function numbers.print_table(title, rows)
  local widths = {}
  for _, row in ipairs(rows) do
    for column, cell in ipairs(row) do widths[column] = math.max(widths[column] or 1, #cell) end
  end
  print(("\n%s"):format(title))
  for _, row in ipairs(rows) do
    local cells = {}
    for column, cell in ipairs(row) do
      cells[column] = ("%" .. (column == 1 and "-" or "") .. widths[column] .. "s"):format(cell)
    end
    print(("  " .. table.concat(cells, "  ")):match "^(.-)%s*$")
  end
  io.stdout:flush()
end

local function csv_cell(cell)
  if cell:find "^-?%d[%d,]*$" then return (cell:gsub(",", "")) end
  return cell:find '[,"]' and '"' .. cell:gsub('"', '""') .. '"' or cell
end

--- The same rows as a file.
function numbers.write_csv(path, rows)
  local file = assert(io.open(path, "w"))
  for _, row in ipairs(rows) do
    local cells = {}
    for column, cell in ipairs(row) do cells[column] = csv_cell(cell) end
    file:write(table.concat(cells, ","), "\n")
  end
  file:close()
end

return numbers
