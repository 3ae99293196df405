// ---------------------------------------------------------------- heat map on a canvas

// The canvas is as wide as its frame and only the visible columns are drawn: browsers limit the width of a canvas, and
// two thousand tokens exceed that limit.
// Cells without a value (null) show the page: tokens behind a target, keys behind a query, experts left out.
const labelLength = () => view().tokens.reduce((n, token) => Math.max(n, Math.min(12, [...visible(token)].length)), 1);
const columnName = (c, room) => brief(view().tokens[c].trim() || view().tokens[c], room);
class HeatMap {
  constructor(host, spec) {
    Object.assign(this, {gutter: 54, cursor: null, marked: null, markedRow: null, boundary: null}, spec);
    this.canvas = el('canvas', {tabindex: 0, role: 'application', 'aria-roledescription': 'heat map'});
    this.space = el('div', {}, this.canvas);
    this.frame = el('div', {class: 'map'}, this.space);
    fill(host, signOfMore(this.frame));
    this.frame.addEventListener('scroll', () => { hideTip(); this.draw(); });
    this.canvas.addEventListener('mousemove', e => this.hover(e));
    this.canvas.addEventListener('mouseleave', () => { this.cursor = null; hideTip(); this.draw(); });
    this.canvas.addEventListener('click', e => { const cell = this.at(e); if (cell && this.picks(cell)) this.pick(...cell); });
    this.canvas.addEventListener('keydown', e => this.key(e));
    this.canvas.addEventListener('blur', () => { this.cursor = null; hideTip(); this.draw(); });
    onResize(this.frame, () => this.draw());
  }
  show(values, label, scale) {
    this.values = values;
    this.rows = values.length;
    this.cols = values[0].length;
    this.scale = scale || largest(values);
    this.label = labelLength();
    this.cursor = null;
    this.canvas.setAttribute('aria-label', `${label}. Arrow keys move over the ${this.rows} rows and ${this.cols} columns.`);
    legend(this.legend, this.scale);
    this.draw();
  }
  measure() {
    this.width = this.frame.clientWidth;
    if (this.names) this.gutter = Math.min(this.width < 560 ? 96 : 168, 18 + 7.3 * this.longest());
    const room = this.width - this.gutter - 2;
    this.cw = Math.max(this.least, Math.min(this.most, room / this.cols));
    this.ch = this.compact ? Math.max(3, Math.min(20, Math.floor(560 / this.rows))) : this.rows <= 20 ? 22 : this.rows <= 34 ? 17 : 14;
    this.flat = !this.tokens || this.cw >= 64;
    this.top = this.flat ? 24 : 14 + 7.4 * this.label;
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
  longest() {
    let most = 1;
    for (let r = 0; r < this.rows; r++) most = Math.max(most, [...this.rowLabel(r)].length);
    return most;
  }
  // Rounded to whole pixels, so that the gaps between cells are sharp and equally wide.
  x(c) { return this.gutter + Math.round(c * this.cw) - Math.round(this.frame.scrollLeft); }
  across(c) { return this.x(c + 1) - this.x(c); }
  y(r) { return this.top + r * this.ch; }
  drawRows(ctx) {
    ctx.font = `12px ${this.look.mono}`;
    ctx.textAlign = 'right';
    ctx.textBaseline = 'middle';
    const every = Math.ceil(12 / this.ch), room = Math.floor((this.gutter - 12) / ctx.measureText('0').width);
    for (let r = 0; r < this.rows; r += every) {
      const chosen = r === this.markedRow || (this.cursor && this.cursor[0] === r);
      ctx.fillStyle = chosen ? this.look.text : this.look.soft;
      ctx.fillText(brief(this.rowLabel(r), room), this.gutter - 8, this.y(r) + this.ch / 2 + 0.5);
    }
  }
  drawCells(ctx) {
    const gap = this.cw >= 6 ? 1 : 0, low = this.ch >= 6 ? 1 : 0;
    for (let r = 0; r < this.rows; r++) {
      for (let c = this.first; c < this.last; c++) {
        if (this.values[r][c] === null || this.values[r][c] === undefined) continue;
        ctx.fillStyle = this.look.line;
        ctx.fillRect(this.x(c) - gap, this.y(r) - low, this.across(c) + gap, this.ch + low);
        ctx.fillStyle = css(colour(this.values[r][c], this.scale));
        ctx.fillRect(this.x(c), this.y(r), this.across(c) - gap, this.ch - low);
      }
    }
  }
  drawColumns(ctx) {
    ctx.font = `12px ${this.look.mono}`;
    ctx.fillStyle = this.look.soft;
    const char = ctx.measureText('0').width;
    if (this.tokens && !this.flat) {
      ctx.textAlign = 'left';
      const every = Math.ceil(12 / this.cw);
      for (let c = Math.ceil(this.first / every) * every; c < this.last; c += every) {
        ctx.save();
        ctx.translate(this.x(c) + this.cw / 2, this.top - 6);
        ctx.rotate(-Math.PI / 2);
        ctx.fillStyle = c === this.marked ? this.look.text : this.look.soft;
        ctx.fillText(columnName(c, this.label), 0, 0);
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
    const end = this.boundary && this.boundary();
    if (end && end < this.cols) {
      ctx.fillStyle = this.look.text;
      ctx.fillRect(this.x(end) - 1.5, 0, 2, this.height);
    }
    if (this.markedRow !== null && this.markedRow < this.rows) {
      ctx.strokeStyle = this.look.accent;
      ctx.lineWidth = 2;
      ctx.strokeRect(this.gutter, this.y(this.markedRow) - 1, this.width - this.gutter - 1, this.ch + 1);
    }
    if (this.marked !== null) {
      ctx.strokeStyle = this.look.accent;
      ctx.lineWidth = 2;
      ctx.strokeRect(this.x(this.marked) - 1, this.top - 1, this.across(this.marked) + 1, this.rows * this.ch + 1);
    }
    if (this.cursor && this.cursor[1] !== null) {
      ctx.strokeStyle = this.look.cursor;
      ctx.lineWidth = 2;
      ctx.strokeRect(this.x(this.cursor[1]) - 0.5, this.y(this.cursor[0]) - 0.5, this.across(this.cursor[1]), this.ch);
    }
  }
  // A cell as row and column; on a row's name, where that tells something, the column is null.
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    const c = Math.floor((x - this.gutter + this.frame.scrollLeft) / this.cw), r = Math.floor((y - this.top) / this.ch);
    if (r < 0 || r >= this.rows) return null;
    if (x < this.gutter) return this.tellRow ? [r, null] : null;
    return c >= 0 && c < this.cols ? [r, c] : null;
  }
  picks(cell) { return this.pick && (cell[1] === null || this.values[cell[0]][cell[1]] !== null); }
  hover(event) {
    const cell = this.at(event);
    this.canvas.style.cursor = cell && this.picks(cell) ? 'pointer' : 'default';
    const text = !cell ? '' : cell[1] === null ? this.tellRow(cell[0]) : this.tell(...cell);
    if (text) showTip(text, event.clientX, event.clientY);
    else hideTip();
    if (String(cell) !== String(this.cursor)) { this.cursor = cell; this.draw(); }
  }
  key(event) {
    const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (event.key === 'Enter' && this.cursor && this.picks(this.cursor)) this.pick(...this.cursor);
    if (event.key === 'Escape') hideTip();
    if (!move) return;
    event.preventDefault();
    const [r, c] = this.cursor && this.cursor[1] !== null ? this.cursor : [-move[0], -move[1]];
    this.cursor = [Math.max(0, Math.min(this.rows - 1, r + move[0])), Math.max(0, Math.min(this.cols - 1, c + move[1]))];
    this.reveal(this.cursor[1]);
    this.draw();
    const box = this.canvas.getBoundingClientRect();
    const text = this.tell(...this.cursor) || 'no value';
    showTip(text, box.left + this.x(this.cursor[1]) + this.cw, box.top + this.y(this.cursor[0]));
    byId('spoken').textContent = text;
  }
  reveal(c) {
    const room = this.width - this.gutter, left = c * this.cw, from = this.frame.scrollLeft;
    if (left < from || left + this.cw > from + room) this.frame.scrollLeft = left + this.cw / 2 - room / 2;
  }
  markRow(r) { this.markedRow = r; this.draw(); }
  point(r) { this.cursor = r === null ? null : [r, null]; this.draw(); }
  see(c) { if (this.values && this.width) this.reveal(c); }
  mark(c) { this.marked = c; if (this.values && this.width) this.reveal(c); this.draw(); }
}
