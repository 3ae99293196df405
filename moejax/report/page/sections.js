// ---------------------------------------------------------------- sections

const current = () => data.targets[state.target];

function renderHeader() {
  byId('model').textContent = visible(data.model);
  const prompt = el('dd', {class: 'prompt', tabindex: data.prompt.length > 400 ? 0 : null}, data.prompt.split('\n').map(visible).join('↵\n').replace(/∅/g, ''));
  fill(byId('facts'), el('dt', {}, 'Rule'), el('dd', {}, visible(data.rule)), el('dt', {}, 'Prompt'), prompt,
    el('dt', {}, 'Shape'), el('dd', {}, `${T} tokens, ${L} layers, ` +
      (E ? `${E} experts, ${data.expert_ids[0][0].length} routed per token` : 'all dense')));
  byId('targets').hidden = data.targets.length < 2;
  fill(byId('targets'), ...data.targets.map((t, n) => el('button', {type: 'button', 'data-target': n, 'aria-pressed': 'false',
    onclick: () => selectTarget(n)}, el('span', {class: 'mono'}, visible(t.label)), el('small', {}, `after ${t.position}`))));
}

function renderTarget() {
  const t = current();
  const toggle = el('button', {type: 'button', 'aria-pressed': String(state.root), title: 'Show small values more clearly',
    onclick: () => { state.root = !state.root; renderAll(); byId('target').querySelector('button').focus(); }}, 'Square-root colours');
  fill(byId('target'),
    el('div', {class: 'target-line'}, el('strong', {}, visible(t.label)),
      el('span', {}, 'value ', el('b', {class: 'num'}, fmt(t.value, false))),
      el('span', {}, `predicted after token ${t.position}, `, el('span', {class: 'mono'}, quoted(data.tokens[t.position]))),
      el('span', {class: 'controls'}, toggle)),
    el('p', {class: 'line', id: 'ledger-line'}, t.summary));
}

function tellToken(c) {
  const t = current();
  const where = c === t.position ? '\nthe target is predicted after this token' : c > t.position ? '\nafter the target' : '';
  return `${quoted(data.tokens[c])}\nposition ${c}, id ${data.token_ids[c]}\nrelevance ${fmt(t.tokens[c])}${where}`;
}

function renderTokens() {
  const t = current(), scale = largest([t.tokens]), nodes = [];
  legend('legend-tokens', scale);
  data.tokens.forEach((token, c) => {
    const kind = c === t.position ? 'tok at' : c > t.position ? 'tok later' : 'tok';
    nodes.push(el('span', {class: kind, role: 'option', id: `tok-${c}`, 'data-token': c, style: paint(t.tokens[c], scale),
      'aria-label': tellToken(c).replace(/\n/g, ', '), 'aria-selected': String(c === state.token),
      tabindex: c === state.token ? 0 : -1}, visible(token)));
    for (const _ of token.matchAll(/\n/g)) nodes.push(el('br'));
    if (!token.endsWith('\n')) nodes.push(el('wbr'));
  });
  fill(byId('tokens'), ...nodes);
}

function listenTokens() {
  const box = byId('tokens');
  const index = e => { const node = e.target.closest('[data-token]'); return node ? Number(node.dataset.token) : null; };
  box.addEventListener('click', e => { const c = index(e); if (c !== null) { selectToken(c); byId(`tok-${c}`).focus(); } });
  box.addEventListener('mousemove', e => { const c = index(e); if (c === null) hideTip(); else showTip(tellToken(c), e.clientX, e.clientY); });
  box.addEventListener('mouseleave', hideTip);
  box.addEventListener('focusout', hideTip);
  box.addEventListener('keydown', e => {
    const to = {ArrowRight: state.token + 1, ArrowLeft: state.token - 1, Home: 0, End: T - 1}[e.key];
    if (e.key === 'Escape') hideTip();
    if (to === undefined) return;
    e.preventDefault();
    selectToken(Math.max(0, Math.min(T - 1, to)));
    const node = byId(`tok-${state.token}`), rect = node.getBoundingClientRect();
    node.focus();
    showTip(tellToken(state.token), rect.left, rect.bottom - 12);
  });
}

function renderCandidates() {
  const t = current();
  byId('candidates-note').textContent = `The model's most likely tokens after token ${t.position}.`;
  fill(byId('candidates'), ...t.candidates.map(c => el('li', {title: `id ${c.id}, logit ${fmt(c.logit, false)}, probability ${percent(c.probability || 0)}`},
    el('i', {style: {width: percent(c.probability || 0)}}),
    el('span', {}, el('span', {class: 'mono'}, quoted(c.token)), el('small', {}, `id ${c.id}`)),
    el('span', {class: 'num'}, percent(c.probability || 0), el('small', {}, fmt(c.logit, false))))));
}

function renderToken() {
  const t = current(), c = state.token;
  const scale = largest(t.experts.map(layer => layer[c]));
  legend('legend-token', scale);
  const slots = data.expert_ids[0][0].length;
  const head = el('tr', {}, el('th', {scope: 'col'}, 'layer'), el('th', {scope: 'col'}, 'stream entering'),
    ...Array.from({length: slots}, (_, k) => el('th', {scope: 'col', style: {textAlign: 'left'}}, `slot ${k}`)));
  const rows = data.expert_ids.map((layer, l) => el('tr', {}, el('th', {scope: 'row'}, String(l)),
    el('td', {class: 'num'}, fmt(t.layers[l][c])),
    ...layer[c].map((expert, k) => expert < 0 ? el('td', {class: 'slot'}, el('small', {}, 'dense')) : el('td', {class: 'slot', style: paint(t.experts[l][c][k], scale),
      title: `layer ${l}, expert ${expert}: weight ${fmt(data.expert_weights[l][c][k], false)}, relevance ${fmt(t.experts[l][c][k])}`},
      el('b', {}, `E${expert} `), el('span', {class: 'num'}, fmt(t.experts[l][c][k])),
      el('small', {}, `weight ${fmt(data.expert_weights[l][c][k], false)}`)))));
  fill(byId('token'),
    el('div', {class: 'target-line'}, el('strong', {id: 'token-name'}, quoted(data.tokens[c])),
      el('span', {}, `position ${c}, id ${data.token_ids[c]}`),
      el('span', {}, 'relevance ', el('b', {class: 'num'}, fmt(t.tokens[c])))),
    el('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Experts of the selected token, by layer'},
      el('table', {}, el('thead', {}, head), el('tbody', {}, ...rows))));
}

function buildMaps() {
  const share = (row, c) => { const sum = row.reduce((s, x) => s + Math.abs(x || 0), 0); return sum ? Math.abs(row[c] || 0) / sum : 0; };
  const layerName = r => r === L ? 'final' : `L${r}`;
  maps.experts = new HeatMap(byId('map-experts'), {legend: 'legend-experts', least: 7, most: 64, rowLabel: r => `L${r}`,
    tell: (r, c) => `layer ${r}, expert ${c}\nrelevance ${fmt(current().expert_map[r][c])}\n` +
      `${percent(share(current().expert_map[r], c))} of the layer\n${data.counts[r][c]} of ${T} tokens routed`});
  maps.layers = new HeatMap(byId('map-layers'), {legend: 'legend-layers', least: 17, most: 96, tokens: true, rowLabel: layerName,
    pick: (r, c) => selectToken(c),
    tell: (r, c) => `${quoted(data.tokens[c])} at position ${c}\nentering ${r === L ? 'the final norm' : `layer ${r}`}\nrelevance ${fmt(current().layers[r][c])}`});
  maps.heads = new HeatMap(byId('map-heads'), {legend: 'legend-heads', least: 7, most: 64, rowLabel: r => `L${r}`,
    tell: (r, c) => `layer ${r}, head ${c}\nrelevance ${fmt(current().head_map[r][c])}\n${percent(share(current().head_map[r], c))} of the layer`});
}

function renderMaps() {
  const t = current();
  byId('map-experts').closest('section').hidden = !E;
  if (E) maps.experts.show(t.expert_map, 'Relevance by layer and expert');
  maps.layers.show(t.layers, 'Relevance by layer and token');
  byId('map-heads').closest('section').hidden = !t.head_map[0].length;
  if (t.head_map[0].length) maps.heads.show(t.head_map, 'Relevance by layer and attention head');
}

function renderLedger() {
  const t = current(), ledger = t.ledger, names = Object.keys(ledger.leaks);
  const cell = (x, sign = true) => el('td', {class: 'num'}, x === undefined ? '' : fmt(x, sign));
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
    el('div', {class: 'scroll tall', tabindex: 0, role: 'region', 'aria-label': 'Ledger by layer'},
      el('table', {}, el('thead', {}, head), el('tbody', {}, ...rows), el('tfoot', {}, ...foot))));
}

// ---------------------------------------------------------------- state

function selectToken(c) {
  const before = byId(`tok-${state.token}`), after = byId(`tok-${c}`);
  before.setAttribute('aria-selected', 'false');
  before.tabIndex = -1;
  after.setAttribute('aria-selected', 'true');
  after.tabIndex = 0;
  state.token = c;
  showSelected();
}

function showSelected() {
  const box = byId('tokens'), node = byId(`tok-${state.token}`);
  const top = node.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + node.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
  renderToken();
  maps.layers.mark(state.token);
}

function selectTarget(n) {
  state.target = n;
  for (const b of byId('targets').children) b.setAttribute('aria-pressed', String(Number(b.dataset.target) === n));
  const values = current().tokens.map(x => Math.abs(x || 0));
  state.token = values.indexOf(values.reduce((m, x) => Math.max(m, x), 0));
  renderAll();
}

function renderAll() {
  hideTip();
  renderTarget();
  renderTokens();
  renderCandidates();
  renderMaps();
  showSelected();
  renderLedger();
}

renderHeader();
buildMaps();
listenTokens();
selectTarget(0);
dark.addEventListener('change', renderAll);
addEventListener('scroll', hideTip, {passive: true});
