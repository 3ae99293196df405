(() => {
'use strict';

const data = JSON.parse(document.getElementById('report-data').textContent);
const L = data.expert_ids.length, T = data.tokens.length, E = data.num_experts;
const dark = matchMedia('(prefers-color-scheme: dark)');
const state = {target: 0, token: 0, root: false};
const maps = {};
const byId = id => document.getElementById(id);

// ---------------------------------------------------------------- numbers, text, elements

function fmt(x, sign = true) {
  if (x === null || x === undefined) return 'n/a';
  const plus = sign && x > 0 ? '+' : '';
  if (x === 0) return '0';
  const size = Math.abs(x);
  if (size >= 1e6 || size < 1e-4) return plus + x.toExponential(2);
  return plus + (size >= 1000 ? x.toFixed(0) : x.toPrecision(3));
}

const percent = x => `${(100 * x).toFixed(1)}%`;
const largest = rows => rows.reduce((m, row) => row.reduce((n, x) => Math.max(n, Math.abs(x || 0)), m), 0) || 1;

// The same as aggregate.visible: line breaks, tabs, control characters and direction overrides become visible signs.
const NAMED = {'\n': '↵', '\t': '⇥', '\r': '␍'};
function visible(token) {
  const escape = c => {
    const code = c.charCodeAt(0);
    return NAMED[c] || (code < 0x100 ? '\\x' + code.toString(16).padStart(2, '0') : '\\u' + code.toString(16).padStart(4, '0'));
  };
  const wild = /[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  return token.replace(wild, escape) || '∅';
}
const quoted = token => `'${visible(token)}'`;
function brief(token, room) {
  const shown = [...visible(token)];
  return shown.length > room ? shown.slice(0, Math.max(1, room - 1)).join('') + '…' : shown.join('');
}

// Text only ever enters the page through textContent and attributes: a token can never become markup.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === 'style') Object.assign(node.style, value);
    else if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
const fill = (node, ...children) => node.replaceChildren(...children);

// ---------------------------------------------------------------- colours

const STOPS = {
  light: [[33, 102, 172], [146, 197, 222], [255, 255, 255], [244, 165, 130], [178, 24, 43]],
  dark: [[126, 194, 247], [45, 107, 163], [37, 42, 49], [168, 74, 60], [255, 160, 138]],
};
function colour(value, scale) {
  const stops = dark.matches ? STOPS.dark : STOPS.light;
  let unit = Math.max(-1, Math.min(1, (value || 0) / scale));
  if (state.root) unit = Math.sign(unit) * Math.sqrt(Math.abs(unit));
  const place = (unit + 1) / 2 * (stops.length - 1);
  const left = Math.min(Math.floor(place), stops.length - 2);
  return stops[left].map((a, i) => Math.round(a + (stops[left + 1][i] - a) * (place - left)));
}
const css = rgb => `rgb(${rgb.join(',')})`;
function ink(rgb) {
  const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? '#000' : '#fff';
}
function paint(value, scale) {
  const background = colour(value, scale);
  return {backgroundColor: css(background), color: ink(background)};
}
function legend(id, scale) {
  const steps = Array.from({length: 33}, (_, i) => css(colour((i - 16) / 16, 1)));
  const bar = el('i', {style: {background: `linear-gradient(to right, ${steps.join(',')})`}});
  fill(byId(id), fmt(-scale), bar, fmt(scale));
  byId(id).setAttribute('title', 'blue: speaks against the target; red: speaks for it; the middle is zero');
}

// ---------------------------------------------------------------- tooltip

const tip = byId('tip');
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const {width, height} = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? Math.max(6, y - height - 12) : y + 18}px`;
}
const hideTip = () => { tip.hidden = true; };

// ---------------------------------------------------------------- heat map on a canvas

// Only the visible columns are drawn, on a canvas as wide as its frame: a browser limits how wide a canvas may be,
// and two thousand tokens pass that limit.
const LABEL = data.tokens.reduce((n, token) => Math.max(n, Math.min(12, [...visible(token)].length)), 1);
const columnName = (c, room) => brief(data.tokens[c].trim() || data.tokens[c], room);
class HeatMap {
  constructor(host, spec) {
    Object.assign(this, {gutter: 54, cursor: null, marked: null}, spec);
    this.canvas = el('canvas', {tabindex: 0, role: 'application', 'aria-roledescription': 'heat map'});
    this.space = el('div', {}, this.canvas);
    this.frame = el('div', {class: 'map'}, this.space);
    fill(host, this.frame);
    this.frame.addEventListener('scroll', () => { hideTip(); this.draw(); });
    this.canvas.addEventListener('mousemove', e => this.hover(e));
    this.canvas.addEventListener('mouseleave', () => { this.cursor = null; hideTip(); this.draw(); });
    this.canvas.addEventListener('click', e => { const cell = this.at(e); if (cell && this.pick) this.pick(...cell); });
    this.canvas.addEventListener('keydown', e => this.key(e));
    this.canvas.addEventListener('blur', () => { this.cursor = null; hideTip(); this.draw(); });
    new ResizeObserver(() => this.draw()).observe(this.frame);
  }
  show(values, label) {
    this.values = values;
    this.rows = values.length;
    this.cols = values[0].length;
    this.scale = largest(values);
    this.canvas.setAttribute('aria-label', `${label}. Arrow keys move over the ${this.rows} rows and ${this.cols} columns.`);
    legend(this.legend, this.scale);
    this.draw();
  }
  measure() {
    this.width = this.frame.clientWidth;
    const room = this.width - this.gutter - 2;
    this.cw = Math.max(this.least, Math.min(this.most, room / this.cols));
    this.ch = this.rows <= 20 ? 22 : this.rows <= 34 ? 17 : 14;
    this.flat = !this.tokens || this.cw >= 64;
    this.top = this.flat ? 24 : 14 + 7.4 * LABEL;
    this.height = this.top + this.rows * this.ch + 2;
    this.space.style.width = `${Math.max(this.gutter + this.cols * this.cw + 2, 1)}px`;
  }
  draw() {
    if (!this.values || !this.frame.clientWidth) return;
    this.measure();
    const dpr = devicePixelRatio || 1, ctx = this.canvas.getContext('2d');
    this.canvas.width = Math.round(this.width * dpr);
    this.canvas.height = Math.round(this.height * dpr);
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0);
    const style = getComputedStyle(document.body);
    this.look = {text: style.getPropertyValue('--text'), soft: style.getPropertyValue('--soft'),
      line: style.getPropertyValue('--line'), accent: style.getPropertyValue('--accent'),
      cursor: style.getPropertyValue('--cursor'), mono: style.getPropertyValue('--mono')};
    this.first = Math.max(0, Math.floor(this.frame.scrollLeft / this.cw));
    this.last = Math.min(this.cols, Math.ceil((this.frame.scrollLeft + this.width - this.gutter) / this.cw));
    this.drawRows(ctx);
    ctx.save();
    ctx.beginPath();
    ctx.rect(this.gutter - 1, 0, this.width - this.gutter + 1, this.height);
    ctx.clip();
    this.drawCells(ctx);
    this.drawColumns(ctx);
    this.drawMarks(ctx);
    ctx.restore();
  }
  // Rounded, so that the gaps between the cells are sharp and all of one width.
  x(c) { return this.gutter + Math.round(c * this.cw) - Math.round(this.frame.scrollLeft); }
  across(c) { return this.x(c + 1) - this.x(c); }
  y(r) { return this.top + r * this.ch; }
  drawRows(ctx) {
    ctx.font = `12px ${this.look.mono}`;
    ctx.textAlign = 'right';
    ctx.textBaseline = 'middle';
    ctx.fillStyle = this.look.soft;
    for (let r = 0; r < this.rows; r++) ctx.fillText(this.rowLabel(r), this.gutter - 8, this.y(r) + this.ch / 2 + 0.5);
  }
  drawCells(ctx) {
    const gap = this.cw >= 6 ? 1 : 0;
    ctx.fillStyle = this.look.line;
    ctx.fillRect(this.x(0) - 1, this.top - 1, this.x(this.cols) - this.x(0) + 1, this.rows * this.ch + 1);
    for (let r = 0; r < this.rows; r++) {
      for (let c = this.first; c < this.last; c++) {
        ctx.fillStyle = css(colour(this.values[r][c], this.scale));
        ctx.fillRect(this.x(c), this.y(r), this.across(c) - gap, this.ch - 1);
      }
    }
  }
  drawColumns(ctx) {
    ctx.font = `12px ${this.look.mono}`;
    ctx.fillStyle = this.look.soft;
    const char = ctx.measureText('0').width;
    if (this.tokens && !this.flat) {
      ctx.textAlign = 'left';
      for (let c = this.first; c < this.last; c++) {
        ctx.save();
        ctx.translate(this.x(c) + this.cw / 2, this.top - 6);
        ctx.rotate(-Math.PI / 2);
        ctx.fillStyle = c === this.marked ? this.look.text : this.look.soft;
        ctx.fillText(columnName(c, LABEL), 0, 0);
        ctx.restore();
      }
      return;
    }
    ctx.textAlign = 'center';
    const step = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100].find(n => n * this.cw >= 30) || 200;
    for (let c = Math.ceil(this.first / step) * step; c < this.last; c += this.tokens ? 1 : step) {
      const name = this.tokens ? columnName(c, Math.floor((this.cw - 4) / char)) : String(c);
      ctx.fillText(name, this.x(c) + this.cw / 2, this.top - 11);
    }
  }
  drawMarks(ctx) {
    if (this.marked !== null) {
      ctx.strokeStyle = this.look.accent;
      ctx.lineWidth = 2;
      ctx.strokeRect(this.x(this.marked) - 1, this.top - 1, this.across(this.marked) + 1, this.rows * this.ch + 1);
    }
    if (this.cursor) {
      ctx.strokeStyle = this.look.cursor;
      ctx.lineWidth = 2;
      ctx.strokeRect(this.x(this.cursor[1]) - 0.5, this.y(this.cursor[0]) - 0.5, this.across(this.cursor[1]), this.ch);
    }
  }
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    const c = Math.floor((x - this.gutter + this.frame.scrollLeft) / this.cw), r = Math.floor((y - this.top) / this.ch);
    return x >= this.gutter && c >= 0 && c < this.cols && r >= 0 && r < this.rows ? [r, c] : null;
  }
  hover(event) {
    const cell = this.at(event);
    this.canvas.style.cursor = cell && this.pick ? 'pointer' : 'default';
    if (cell) showTip(this.tell(...cell), event.clientX, event.clientY);
    else hideTip();
    if (String(cell) !== String(this.cursor)) { this.cursor = cell; this.draw(); }
  }
  key(event) {
    const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (event.key === 'Enter' && this.cursor && this.pick) this.pick(...this.cursor);
    if (event.key === 'Escape') hideTip();
    if (!move) return;
    event.preventDefault();
    const [r, c] = this.cursor || [-move[0], -move[1]];
    this.cursor = [Math.max(0, Math.min(this.rows - 1, r + move[0])), Math.max(0, Math.min(this.cols - 1, c + move[1]))];
    this.reveal(this.cursor[1]);
    this.draw();
    const box = this.canvas.getBoundingClientRect();
    const text = this.tell(...this.cursor);
    showTip(text, box.left + this.x(this.cursor[1]) + this.cw, box.top + this.y(this.cursor[0]));
    byId('spoken').textContent = text;
  }
  reveal(c) {
    const room = this.width - this.gutter, left = c * this.cw, from = this.frame.scrollLeft;
    if (left < from || left + this.cw > from + room) this.frame.scrollLeft = left + this.cw / 2 - room / 2;
  }
  mark(c) { this.marked = c; if (this.values && this.width) this.reveal(c); this.draw(); }
}

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
  const toggle = el('button', {type: 'button', 'aria-pressed': String(state.root), title: 'Shows small values more clearly',
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
  const where = c === t.position ? '\nthe target is predicted here' : c > t.position ? '\nafter the target' : '';
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
  byId('candidates-note').textContent = `What the model predicts after token ${t.position}.`;
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
  const rows = t.layer_sums.map((sum, l) => el('tr', {}, el('th', {scope: 'row'}, l === L ? 'after the last' : String(l)),
    cell(sum), ...names.map(name => cell(ledger.leaks[name][l]))));
  const last = (label, ...cells) => el('tr', {}, el('th', {scope: 'row'}, label), ...cells);
  const blanks = () => names.map(() => el('td'));
  const foot = [last('total', cell(ledger.tokens), ...names.map(name => cell(total(ledger.leaks[name])))),
    last('residual', cell(ledger.residual), ...blanks()),
    last('target', cell(ledger.target), ...blanks())];
  fill(byId('ledger'), el('p', {class: 'line'}, t.summary),
    names.length ? '' : el('p', {class: 'note'}, 'This rule names no leak.'),
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
})();
