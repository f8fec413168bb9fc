// Sorts the rows by the column whose button is pressed, and hides those without the words that are looked for.
const body = document.querySelector('tbody'), rows = [...body.rows], buttons = [...document.querySelectorAll('thead button')]
const told = document.querySelector('output'), find = document.querySelector('input')
const key = (row, at) => row.cells[at].dataset.key
const order = (a, b) => a - b || a.localeCompare(b, undefined, {numeric: true})   // numbers as numbers, names by their numbers
document.documentElement.classList.add('js')

buttons.forEach(button => button.addEventListener('click', () => {
  const head = button.closest('th'), at = head.cellIndex, down = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1
  buttons.forEach(b => b.closest('th').removeAttribute('aria-sort'))
  head.setAttribute('aria-sort', down > 0 ? 'ascending' : 'descending')
  rows.sort((a, b) => down*order(key(a, at), key(b, at)))
  body.append(...rows)
  told.textContent = `sorted by ${button.textContent}, ${head.getAttribute('aria-sort')}`
}))

const narrow = () => {
  const wanted = find.value.toLowerCase()
  rows.forEach(row => { row.hidden = !`${row.textContent} ${row.dataset.find}`.toLowerCase().includes(wanted) })
  const left = rows.filter(row => !row.hidden).length
  told.textContent = left === 1 ? '1 neuron' : `${left} neurons`
}
find.addEventListener('input', narrow)
addEventListener('pageshow', () => find.value && narrow())   // back from a page, with the words still in the box
