// ---------------------------------------------------------------- files to download: made here, without a network

function offer(content, type, ending) {
  const name = visible(data.model).replace(/[^\w.-]+/g, '-').slice(-60) || 'model';
  const link = el('a', {href: URL.createObjectURL(new Blob([content], {type})), download: `${name}-relevance.${ending}`});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A spreadsheet would run a cell that begins like a formula.
function csvCell(value) {
  const text = String(value ?? '');
  const safe = typeof value === 'string' && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]|^\s|\s$/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
}

function matrixCsv() {
  const rows = [['target', 'label', 'token', 'piece', 'part', 'relevance']];
  matrixValues().forEach((row, n) => row.forEach((x, c) => {
    if (x !== null) rows.push([n, data.targets[n].label, c, view().tokens[c], c < view().prompt_length ? 'prompt' : 'answer', x]);
  }));
  return rows.map(row => row.map(csvCell).join(',')).join('\r\n') + '\r\n';
}

function matrixSvg() {
  const values = matrixValues(), scale = largest(values), cell = 22;
  const xml = text => visible(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
  const rowNames = data.targets.map(t => brief(t.label, 28)), columnNames = view().tokens.map((_, c) => columnName(c, 16));
  const length = names => Math.max(...names.map(name => [...name].length));
  const left = 16 + 7.4 * length(rowNames), top = 16 + 7.4 * length(columnNames);
  const width = left + cell * count() + 8, height = top + cell * N + 8, style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue('--text'), mono = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
  const parts = [`<svg xmlns="http:\u002f/www.w3.org/2000/svg" width="${width}" height="${height}" font-family="${mono}" font-size="12" fill="${text}">`,
    `<rect width="100%" height="100%" fill="${style.getPropertyValue('--card')}"/>`];
  values.forEach((row, r) => {
    const y = top + r * cell;
    parts.push(`<text x="${left - 8}" y="${y + 15}" text-anchor="end">${xml(rowNames[r])}</text>`);
    row.forEach((x, c) => {
      if (x === null) return;
      parts.push(`<rect x="${left + c * cell}" y="${y}" width="${cell - 1}" height="${cell - 1}" fill="${css(colour(x, scale))}"><title>${xml(view().tokens[c])} ${fmt(x)}</title></rect>`);
    });
  });
  columnNames.forEach((name, c) => {
    const x = left + c * cell + 15;
    parts.push(`<text transform="translate(${x} ${top - 6}) rotate(-90)">${xml(name)}</text>`);
  });
  if (boundary() < count()) parts.push(`<rect x="${left + boundary() * cell - 1.5}" y="4" width="2" height="${height - 8}"/>`);
  return parts.join('\n') + '\n</svg>\n';
}

// The picture in twice its size, drawn by the browser. Its address holds the SVG itself, which the page's policy allows.
function savePng() {
  const svg = matrixSvg(), picture = new Image();
  picture.onload = () => {
    const canvas = el('canvas', {width: 2 * picture.width, height: 2 * picture.height}), drawing = canvas.getContext('2d');
    drawing.scale(2, 2);
    drawing.drawImage(picture, 0, 0);
    canvas.toBlob(content => content && offer(content, 'image/png', 'png'), 'image/png');
  };
  picture.src = `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

const downloads = {
  JSON: () => offer(JSON.stringify(data), 'application/json', 'json'),
  CSV: () => offer(matrixCsv(), 'text/csv', 'csv'),
  SVG: () => offer(matrixSvg(), 'image/svg+xml', 'svg'),
  PNG: savePng,
};
const downloadTitles = {JSON: 'The data of this page', CSV: 'Relevance of every token for every target', SVG: 'A picture of targets by tokens', PNG: 'The same picture in pixels'};
