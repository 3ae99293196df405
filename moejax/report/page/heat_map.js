// ---------------------------------------------------------------- heat map on a canvas

// The canvas is as wide as its frame and only the visible columns are drawn: browsers limit the width of a canvas, and
// two thousand tokens exceed that limit.
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
  // Rounded to whole pixels, so that the gaps between cells are sharp and equally wide.
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
