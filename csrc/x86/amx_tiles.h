/* What kernels with tile registers share. Include in a region with tile instructions. */
#ifndef ZQ_AMX_TILES_H
#define ZQ_AMX_TILES_H

/* Bytes between the lines of a panel: four codes of each column */
enum { ZQ_PANEL_LINE = 4 * ZQ_NR };

/* What ldtilecfg reads */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} zq_tile_config;

/* Tile instructions are opaque to the compiler: memory that they read is written before, what they wrote is read behind. */
#define ZQ_TILES_IN_ORDER() __asm__ volatile("" ::: "memory")

/* All tile registers are cleared. */
ZQ_INLINE void
zq_load_tile_config(const zq_tile_config *config)
{
    __asm__ volatile("" ::"r"(config) : "memory"); /* ldtilecfg reads all of it, which gcc 12 is not told */
    _tile_loadconfig(config);
}

#endif
