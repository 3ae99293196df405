// ---------------------------------------------------------------- ledger

function renderLedger() {
  const t = current(), ledger = t.ledger, names = Object.keys(ledger.leaks);
  const cell = x => el('td', {class: 'num'}, x === undefined ? '' : fmt(x));
  const total = values => values.reduce((s, x) => s + x, 0);
  const head = el('tr', {}, el('th', {scope: 'col'}, 'layer'), el('th', {scope: 'col'}, 'relevance entering'),
    ...names.map(name => el('th', {scope: 'col'}, `${visible(name)} leak`)));
  const rows = t.layer_sums.map((sum, l) => el('tr', {}, el('th', {scope: 'row'}, l === L ? 'final norm' : String(l)),
    cell(sum), ...names.map(name => cell(ledger.leaks[name][l]))));
  const last = (label, ...cells) => el('tr', {}, el('th', {scope: 'row'}, label), ...cells);
  const blanks = () => names.map(() => el('td'));
  const foot = [last('total', cell(ledger.tokens), ...names.map(name => cell(total(ledger.leaks[name])))),
    last('residual', cell(ledger.residual), ...blanks()),
    last('target', cell(ledger.target), ...blanks())];
  fill(byId('ledger'), el('p', {class: 'line'}, t.summary),
    names.length ? '' : el('p', {class: 'note'}, 'This rule has no leaks.'),
    table('Ledger by layer', true, el('thead', {}, head), el('tbody', {}, ...rows), el('tfoot', {}, ...foot)));
}
