// Data, numbers, text, elements, colours and the tooltip. html.py joins the scripts into one function.

const data = JSON.parse(document.getElementById('report-data').textContent);
const N = data.targets.length, L = data.counts.length, E = data.num_experts;
const systemDark = matchMedia('(prefers-color-scheme: dark)');
const state = {target: 0, token: 0, root: false, words: false, theme: 'system', top: 'all', layer: null, head: 'sum'};
const maps = {};
// Tokens, or the words that they merge into: html.py made both with one function.
const view = () => (state.words && data.words) || data;
const count = () => view().tokens.length;
const entry = n => ({...data.targets[n], ...view().targets[n]});
const current = () => entry(state.target);
const isDark = () => state.theme === 'dark' || (state.theme === 'system' && systemDark.matches);
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

// The same as visible.visible in Python: line breaks, tabs, and characters that act or hide become signs or code points.
const NAMED = {'\n': '↵', '\t': '⇥', '\r': '␍'};
function visible(token) {
  const escape = c => {
    const hex = n => c.codePointAt(0).toString(16).padStart(n, '0'), code = c.codePointAt(0);
    return NAMED[c] || (code < 0x100 ? '\\x' + hex(2) : code < 0x10000 ? '\\u' + hex(4) : '\\U' + hex(8));
  };
  const wild = /(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\u{e0000}-\u{e0fff}]/gu;
  return token.replace(wild, escape) || '∅';
}
const quoted = token => `'${visible(token)}'`;
function brief(token, room) {
  const shown = [...visible(token)];
  return shown.length > room ? shown.slice(0, Math.max(1, room - 1)).join('') + '…' : shown.join('');
}

// Text enters the page only through textContent and attributes, so a token cannot become markup.
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
const button = (text, pressed, onclick, title) => el('button', {type: 'button', 'aria-pressed': String(pressed), onclick, title}, text);
const select = (label, value, options, onchange) => el('label', {class: 'choice'}, label, el('select', {onchange: e => onchange(e.target.value)},
  ...options.map(([key, text]) => el('option', {value: key, ...(key === value ? {selected: ''} : {})}, text))));

// Later, because what follows may change sizes again.
const onResize = (box, act) => new ResizeObserver(() => requestAnimationFrame(act)).observe(box);

// A box that scrolls sideways shows a sign of where there is more.
function signOfMore(box) {
  const sign = el('span', {class: 'more', 'aria-hidden': 'true'});
  const update = () => {
    const left = box.scrollLeft > 3, right = box.scrollWidth - box.clientWidth - box.scrollLeft > 3;
    sign.textContent = `${left ? '← ' : ''}scroll${right ? ' →' : ''}`;
    sign.hidden = !left && !right;
  };
  box.addEventListener('scroll', update);
  onResize(box, update);
  return el('div', {class: 'scroller'}, sign, box);
}
const table = (label, tall, ...parts) => signOfMore(el('div', {class: tall ? 'scroll tall' : 'scroll', tabindex: 0, role: 'region',
  'aria-label': label}, el('table', {}, ...parts)));

// ---------------------------------------------------------------- colours

function colour(value, scale) {
  const stops = isDark() ? data.colours.dark : data.colours.light;
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
  byId(id).setAttribute('title', 'blue: evidence against the target; red: evidence for it; the middle colour is zero');
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
