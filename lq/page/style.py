"""Style and behaviour of the page."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1f2328; --muted: #59636e; --line: #d9dde2;
  --soft: #f5f7f9; --int8: #0072b2; --float: #8a5a00; --alarm: #b34700; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #e6e8eb; --muted: #9aa2ab;
  --line: #30343a; --soft: #1e2126; --int8: #56b4e9; --float: #e69f00; --alarm: #ff7a3d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { max-width: 48rem; } .muted, figcaption, caption { color: var(--muted); }
a { color: var(--int8); } nav a { margin-right: 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { background: var(--soft); position: sticky; top: 0; } tbody th { position: static; font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; } td.name { white-space: nowrap; }
td.long { min-width: 17rem; }
tr.advised td { color: var(--alarm); } td.float { color: var(--float); } td.int8 { color: var(--int8); }
th button { all: unset; cursor: pointer; font: inherit; }
th button:focus-visible { outline: 2px solid var(--int8); outline-offset: 2px; }
th[aria-sort="ascending"] button::after { content: " \\25b2"; }
th[aria-sort="descending"] button::after { content: " \\25bc"; }
.wide { overflow-x: auto; max-height: 44rem; overflow-y: auto; border: 1px solid var(--line); }
.wide:focus-visible { outline: 2px solid var(--int8); }
pre { white-space: pre-wrap; background: var(--soft); border: 1px solid var(--line); padding: .7rem 1rem; }
figure { margin: 1.2rem 0 2rem; } figure img { max-width: 100%; height: auto; display: block; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .wide { overflow: visible; max-height: none; border: 0; } table { font-size: 6.5pt; } th { position: static; }
  td.long { min-width: 0; } td.name { white-space: normal; overflow-wrap: anywhere; } th, td { padding: .1rem .25rem; }
  figure, tr { break-inside: avoid; } }
"""

#: Sorts a table by the column whose header is clicked (or activated with the keyboard); again to reverse the order.
SCRIPT = """
for (const button of document.querySelectorAll('table.sortable th button')) {
  button.addEventListener('click', () => {
    const header = button.closest('th'), table = header.closest('table'), body = table.tBodies[0];
    const column = header.cellIndex, numeric = header.classList.contains('number');
    const first = numeric && header.dataset.first !== 'ascending' ? 'descending' : 'ascending';
    const other = first === 'ascending' ? 'descending' : 'ascending';
    const order = header.getAttribute('aria-sort') === first ? other : first;
    for (const th of table.tHead.querySelectorAll('th')) th.removeAttribute('aria-sort');
    header.setAttribute('aria-sort', order);
    const sign = order === 'ascending' ? 1 : -1;
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === '' || y === '') return (x === '') - (y === '');  // what was not measured comes last
      return sign * (numeric ? x - y : x.localeCompare(y, undefined, {numeric: true}));
    });
    body.append(...rows);
  });
}
"""
